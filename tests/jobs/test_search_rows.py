"""The table of a search: which rows stay, whose score they have, and what they took."""

import json
from dataclasses import replace

import pytest

from jobs import search
from jobs.core.run import Run
from jobs.core.stage import Stage
from jobs.searching.log import read_log, write_log
from jobs.searching.rows import _gpu_hours, _memory, read_rows, rows_of, totals, write_rows
from jobs.searching.space import Setting
from jobs.searching.stages import order_stages
from tests.jobs.searching import Factory, Stopped, names, new_run


@pytest.fixture
def factory(monkeypatch):
    return Factory(monkeypatch)


def test_a_narrower_search_in_the_same_folder_keeps_what_was_found(factory, tmp_path, capsys):
    search.job(new_run(tmp_path))
    before, made = read_rows(new_run(tmp_path)), len(factory.made)
    search.job(new_run(tmp_path, search__depths="[0]", search__budget__memory_gib="0.95"))
    after = {row["setting"]: row for row in read_rows(new_run(tmp_path))}
    assert len(factory.made) == made
    assert names(after.values(), "done") == names(before, "done")  # two are over this budget, and yet have their scores
    assert all(row["score_pct"] == after[row["setting"]]["score_pct"] for row in before)
    assert "answer for 0.95 GiB: 2 out, lora, awq 4 bit" in capsys.readouterr().out


def test_rows_of_another_model_or_evaluation_leave_the_table(factory, tmp_path, capsys):
    search.job(new_run(tmp_path))
    path = tmp_path / "search" / "rows.json"
    old = [{**row, "conditions": "other"} for row in read_rows(new_run(tmp_path))]
    path.write_text(json.dumps(old))
    search.job(new_run(tmp_path, search__depths="[0]"))
    assert len(read_rows(new_run(tmp_path))) == 4 and "8 rows of other data" in capsys.readouterr().err


def test_rows_of_older_code_and_unfinished_ones_of_a_wider_search_go(factory, tmp_path, capsys):
    factory.stop_after = 12
    with pytest.raises(Stopped):
        search.job(new_run(tmp_path))
    factory.stop_after = 10**6
    assert "open" in {row["status"] for row in read_rows(new_run(tmp_path)) if row["depth"]}
    search.job(new_run(tmp_path, search__depths="[0]"))
    rows = read_rows(new_run(tmp_path))
    assert len(rows) >= 4 and not names(rows, "open")
    path = tmp_path / "search" / "rows.json"
    path.write_text(json.dumps([{key: value for key, value in row.items() if key != "unpacked"} for row in rows]))
    capsys.readouterr()
    assert read_rows(new_run(tmp_path)) == [] and f"{len(rows)} rows of" in capsys.readouterr().err


def test_the_judges_score_stays_and_what_has_none_is_no_rival(factory, tmp_path, capsys, monkeypatch):
    """A search that the judge scored; then one without it, and with a setting more."""
    monkeypatch.setattr(search.budget, "compare_rows", lambda *_: {"difference_finding": None})
    run = new_run(tmp_path, search__depths="[0]", search__screen_images="null")
    search.job(run)
    controls = {"count": 0, "missed": 0, "by_kind": {}, "unbuilt": []}
    verdict = {"is_llm_judge": True, "judge_interval_pct": [60.0, 80.0], "judgement": "judge-1", "judge": "Qwen"}
    verdict |= {
        "judge_identity": "a",
        "judge_scored": 20,
        "judge_total": 20,
        "judge_unscored": {},
        "judge_flagged": False,
    }
    verdict |= {"judge_controls": controls, "judge_agreement": None, "judge_bounds_pct": [70.0, 70.0]}
    judged = [{**row, **verdict, "judge_pct": 70.0} for row in read_rows(run)]
    write_rows(run, judged)
    assert {row["score_kind"] for row in read_rows(run)} == {"judge"}
    capsys.readouterr()
    search.job(new_run(tmp_path, search__screen_images="null"))
    rows = {row["setting"]: row for row in read_rows(run)}
    assert (rows["lora"]["score_pct"], rows["lora"]["judge_pct"]) == (70.0, 70.0)
    assert rows["2 out, lora"]["status"] == "done" and rows["2 out, lora"]["score_pct"] is None
    said = capsys.readouterr().out
    assert "4 evaluated settings are left out: the judge has scored others, but not them" in said
    assert "LLM judge: Qwen, " in said and "80 of 80 answers scored, of 4 settings" in said and "not run" not in said
    first, *others = read_rows(run)
    write_rows(run, [{**first, "judge_identity": "b"}, *others])
    assert {row["score_kind"] for row in read_rows(run)} == {"baseline"}  # of two judges neither


def test_the_memory_of_several_gpus_is_that_of_the_fullest():
    profile = {"steady_peak_bytes": {"allocated": 1, "fullest": 2**30, "driver": 3 * 2**29}}
    assert _memory(profile, 9.0, False) == {"memory_gib": 1.0, "memory_kind": "GPU, driver, the fullest"}
    del profile["steady_peak_bytes"]["fullest"]
    assert _memory(profile, 9.0, True) == {"memory_gib": 1.5, "memory_kind": "GPU, driver"}
    assert _memory({"steady_peak_bytes": {"resident": 5}}, 9.0, True)["memory_kind"] == "estimate, packed"


def test_rows_compare_only_where_the_evaluation_has_one_version(factory, tmp_path):
    plan = factory.plan(Setting(2, "lora", "awq", 4))
    newer = replace(plan, evaluation=replace(plan.evaluation, version=2))
    first, second = rows_of(new_run(tmp_path), [plan, newer], [1.0, 1.0], {}, {})
    assert first["conditions"] != second["conditions"]


def test_a_line_that_a_kill_cut_short_is_no_end(tmp_path):
    run = new_run(tmp_path)
    write_log(run, {"event": "made", "name": "prune-1"})
    with open(tmp_path / "search" / "log.jsonl", "a") as log:
        log.write('{"event": "ma')
    assert [line["name"] for line in read_log(run)] == ["prune-1"]


def test_rows_of_other_methods_stay(factory, tmp_path):
    run = new_run(tmp_path)
    search.job(run)
    joint = {**read_rows(run)[0], "method": "joint", "setting": "joint 1"}
    write_rows(run, [joint])
    search.job(run)
    rows = json.loads((tmp_path / "search" / "rows.json").read_text())
    assert [row["method"] for row in rows] == ["uniform"] * 8 + ["joint"]


def test_what_sharing_saves_is_counted(factory, tmp_path):
    run = new_run(tmp_path)
    search.job(run)
    sums, rows = totals(run, read_rows(run)), read_rows(run)
    assert sums["stages"] == len(factory.made) == 2 + 2 + 7 + 8 + len(names(rows, "done"))
    manifests = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("artifacts/*/manifest.json")}
    apart = sum(manifests[name]["seconds"] for row in rows for name in row["artifacts"] if name in manifests)
    assert sums["seconds_apart"] == pytest.approx(apart, abs=0.5)  # each row is rounded
    assert sums["seconds"] == pytest.approx(sum(one["seconds"] for one in manifests.values()))
    assert sums["gpu_hours"] == sums["gpu_hours_apart"] == 0 and sums["busy_seconds"] == 0  # no log is written here
    measured = {"event": "measured", "started": 0.0, "seconds": 60.0, "gpu_seconds": 3600.0, "stages": ["nowhere"]}
    write_log(run, measured)  # by the joint choice: for all its rows once
    more = totals(run, rows)
    assert {key: more[key] - sums[key] for key in sums} == pytest.approx(
        {"stages": 0, "seconds": 60, "seconds_apart": 60, "gpu_hours": 1, "gpu_hours_apart": 1, "busy_seconds": 60}
    )


def test_what_a_resumed_stage_held_before_is_unknown(tmp_path):
    def build(run: Run, folder, facts: dict) -> None:
        if not (folder / "begun").exists():
            (folder / "begun").touch()
            raise Stopped

    run, stage = new_run(tmp_path), Stage("ablate", 1, {}, (), build, resume=True)
    with pytest.raises(Stopped):
        run.make(stage)
    run.make(stage)
    assert "gpu_seconds" not in run.facts(stage) and _gpu_hours(run, [stage]) is None


def test_parents_come_first_and_once(factory):
    stages = order_stages([factory.plan(Setting(2, "lora", "awq", 4)).evaluation] * 2)
    assert [stage.kind for stage in stages] == ["prune", "recover", "quantize", "evaluate"]
