"""What is dominated in screening, what is on the front, what a budget allows: from rows alone."""

from dataclasses import replace

import pytest

from jobs.config.search import BudgetConfig
from jobs.searching.budget import (
    Entrant,
    find_dominated,
    format_answer,
    judge_remarks,
    pareto_front,
    resolve,
    within_budget,
)
from jobs.searching.space import Setting

IMAGES = {str(i): f"image {i // 3}" for i in range(60)}


def entrant(
    depth: int, good: float, quantizer: str = "none", recovery: str = "none", gib: float | None = None
) -> Entrant:
    """Right on the share `good` of the images (of three answers each)."""
    setting = Setting(depth, recovery, quantizer, {"none": 16}.get(quantizer, 4))
    scores = {s: float(int(s) // 3 < good * 20) for s in IMAGES}
    return Entrant(setting, 1.0 - 0.1 * depth if gib is None else gib, scores)


def test_a_setting_loses_to_a_better_one_that_takes_no_more():
    weak, healed, whole = entrant(4, 0.4), entrant(4, 0.9, recovery="lora"), entrant(0, 0.95)
    lost = find_dominated([weak, healed, whole], IMAGES)
    assert list(lost) == [weak.setting.key]
    loss = lost[weak.setting.key]
    assert (loss["to"], loss["pct"]) == ("4 out, lora", 50.0) and 20 < loss["low"] < 50 < loss["high"] < 80


def test_none_loses_to_what_takes_more_or_has_other_kernels_or_is_not_resolved():
    assert find_dominated([entrant(4, 0.4), entrant(2, 1.0)], IMAGES) == {}  # fewer layers out
    assert find_dominated([entrant(4, 0.4), entrant(4, 1.0, recovery="lora", gib=2.0)], IMAGES) == {}
    assert find_dominated([entrant(4, 0.4), entrant(4, 1.0, "awq")], IMAGES) == {}  # it may be slower
    assert find_dominated([entrant(4, 0.85), entrant(4, 0.9, recovery="lora")], IMAGES) == {}
    three = replace(entrant(4, 1.0, gib=0.1), setting=Setting(4, "none", "rtn", 3))
    assert find_dominated([entrant(4, 0.4), three], IMAGES) == {}  # simulated: it takes more than it counts
    assert find_dominated([replace(entrant(4, 0.4, gib=0.6), setting=three.setting), entrant(4, 1.0)], IMAGES)
    assert find_dominated([entrant(4, 0.4, "rtn"), entrant(4, 1.0, "awq")], IMAGES).keys() == {("4", "none", "rtn4")}


def row(setting: str, score: float | None, gib: float, ms: float, **more) -> dict:
    given = {"setting": setting, "status": "done", "score_pct": score, "unpacked": False}
    given["score_interval_pct"] = score and [score - 5, score + 5]
    given |= {"memory_gib": gib, "memory_kind": "estimate", "ms_per_token": ms, "estimate_gib": gib, "simulated": False}
    given |= {"is_llm_judge": False, "score_kind": "baseline", "device": "CPU"}
    return given | {"checkpoint": f"artifacts/{setting}", "evaluation": setting} | more


def test_the_runner_up_is_another_checkpoint():
    twin = row("uniform 16 bit, 2 out in 9 GiB", 96.0, 4.0, 9.0, evaluation="a")
    found = resolve([row("b", 95.0, 4.0, 9.0), row("a", 96.0, 4.0, 9.0), twin], BudgetConfig(), lambda *_: {})
    assert (found["answer"]["setting"], found["runner_up"]["setting"]) == ("a", "b")


ROWS = [
    row("whole", 96.0, 13.4, 30.0),
    row("awq", 95.0, 4.5, 20.0),
    row("nf4", 95.0, 4.6, 25.0),
    row("deep", 80.0, 3.9, 10.0),
    row("deep sft", 90.0, 3.9, 10.0),
    row("three bits", 94.0, 3.6, 30.0, simulated=True),
    row("far", 0.0, 2.0, 5.0, status="failed", reason="The loss is nan"),
    row("big", 0.0, 20.0, 5.0, status="over budget"),
]


def names(rows) -> list[str]:
    return [one["setting"] for one in rows]


def test_the_front_has_what_no_other_beats():
    assert names(pareto_front(ROWS, "memory_gib")) == ["deep sft", "awq", "whole"]  # three bits are only simulated
    assert names(pareto_front(ROWS, "ms_per_token")) == ["deep sft", "awq", "whole"]


def difference(best: dict, second: dict) -> dict:
    points = best["score_pct"] - second["score_pct"]
    found = "unresolved" if points < 6 else "better"
    values = {"pct": points, "interval_pct": [points - 6, points + 6], "finding": found, "detectable_pct": 8.5}
    return {f"difference_{name}": value for name, value in values.items()}


def test_the_answer_is_the_best_that_fits_and_leaves_a_margin():
    budget = BudgetConfig(memory_gib=5.0, ms_per_token=25)
    found = resolve(ROWS, budget, difference)
    assert (found["answer"]["setting"], found["runner_up"]["setting"]) == ("awq", "nf4")  # equal scores: less memory
    assert found["margins"] == {"memory_gib": pytest.approx(0.5), "ms_per_token": pytest.approx(5.0)}
    text = format_answer(found, budget)
    assert "answer for 5 GiB and 25 ms/token: awq: 95.0 [90.0, 100.0] (baseline, no LLM judge)" in text
    assert "leaves 0.5 GiB (10 %)" in text and "runner-up: nf4" in text and "artifacts/awq" in text
    assert "+0.0 points [-6.0, +6.0], unresolved by this evaluation, which detects 8.5" in text


def test_another_budget_has_another_answer():
    found = resolve(ROWS, BudgetConfig(memory_gib=4.0), difference)
    assert names([found["answer"], found["runner_up"]]) == ["deep sft", "deep"]
    assert "resolved by this evaluation" in format_answer(found, BudgetConfig(memory_gib=4.0))
    assert resolve(ROWS, BudgetConfig(), difference)["answer"]["setting"] == "whole"


def test_what_is_simulated_failed_or_was_not_run_is_no_answer():
    budget = BudgetConfig(memory_gib=3.7)
    assert not any(within_budget(one, budget) for one in ROWS)
    found = resolve(ROWS, budget, difference)
    assert found["answer"] is None and found["nearest"]["setting"] in ("deep", "deep sft")
    assert "none fits; the nearest is deep" in format_answer(found, budget)
    assert "no setting was evaluated" in format_answer(resolve(ROWS[-2:], budget, difference), budget)


def test_settings_that_an_older_budget_left_out_are_told():
    wide = BudgetConfig(memory_gib=24.0)
    found = resolve(ROWS, wide, difference)
    assert found["untried"] == ["big"] and "1 settings were never tried" in format_answer(found, wide)
    assert resolve(ROWS, BudgetConfig(memory_gib=19.0), difference)["untried"] == []


def test_packed_memory_and_unpacked_time_are_not_one_answer():
    """A joint choice on a CPU: best and smallest, but its ms/token are those of weights of 16 bits."""
    joint = row("joint", 99.0, 3.0, 1.0, unpacked=True, memory_kind="estimate, packed")
    memory, both = BudgetConfig(memory_gib=4.5), BudgetConfig(memory_gib=4.5, ms_per_token=25)
    found = resolve([*ROWS, joint], memory, difference)
    assert found["answer"]["setting"] == "joint" and "joint choices" not in format_answer(found, memory)
    found = resolve([*ROWS, joint], both, difference)
    assert found["answer"]["setting"] == "awq" and "1 joint choices are left out" in format_answer(found, both)
    assert joint in pareto_front([*ROWS, joint], "memory_gib") and joint not in pareto_front(
        [*ROWS, joint], "ms_per_token"
    )
    measured = {**joint, "device": "NVIDIA T4"}  # both of the unpacked weights
    assert within_budget(measured, both) and measured in pareto_front([*ROWS, measured], "ms_per_token")


def test_a_judge_that_failed_its_controls_and_two_judges_are_told_of():
    controls = {"by_kind": {"swapped": {"count": 8, "missed": 2}}, "unbuilt": []}
    verdict = {"is_llm_judge": True, "judge": "Qwen", "judge_identity": "a", "judge_pct": 70.0, "judge_scored": 71}
    verdict |= {
        "judge_total": 72,
        "judge_unscored": {"timeout": 1},
        "judge_controls": controls,
        "judge_agreement": None,
    }
    one, other = row("one", 70.0, 1.0, 1.0, **verdict), row("other", 60.0, 1.0, 1.0, **verdict)
    first, *others = judge_remarks({"one": one, "other": other, "third": ROWS[0]})
    assert first.startswith("LLM judge: Qwen, ") and first.endswith("142 of 144 answers scored, of 2 settings")
    assert any("FLAGGED" in line and "swapped 2 of 8" in line for line in others)
    assert "2 different judges" in judge_remarks({"one": one, "other": {**other, "judge_identity": "b"}})[-1]
    assert judge_remarks({row["setting"]: row for row in ROWS}) == []


def test_what_is_not_finished_or_not_judged_is_told():
    rows = [*ROWS, row("waits", 0.0, 1.0, 1.0, status="open"), row("unjudged", None, 1.0, 1.0)]
    found = resolve(rows, BudgetConfig(), difference)
    assert (found["answer"]["setting"], found["open"], found["unjudged"]) == ("whole", 1, 1)
    text = format_answer(found, BudgetConfig())
    assert "1 settings are not finished" in text and "1 evaluated settings are left out" in text


def test_a_single_setting_has_no_runner_up():
    budget = BudgetConfig(memory_gib=20.0)
    found = resolve(ROWS[:1], budget, difference)
    assert found["runner_up"] is None and "no other setting fits" in format_answer(found, budget)
