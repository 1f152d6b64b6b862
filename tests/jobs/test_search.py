"""A search from plan to answer, its stages files that cost nothing; and killed while it searches in earnest."""

import json
import re

import pytest

import cluster.tuning
from cluster.tables import write_table
from jobs import evaluate, search
from jobs.options import load_config
from jobs.run import Run, Stage
from jobs.search_rows import MEASURED, busy, read_rows, totals
from jobs.search_space import Setting, space
from jobs.search_stages import Plan, ordered

SPACE = {
    "search.depths": "[0, 2]",
    "search.recoveries": "[none, lora]",
    "search.quantizers": "[none, awq]",
    "search.screen_images": "12",
}
GOOD = {"none": 0.5, "lora": 1.0}  # what is not fine-tuned answers every other image rightly
GIB = {"none": 4.0, "awq": 1.0}


class Stopped(BaseException):
    """What a kill does to the driver."""


class Factory:
    """Plans settings whose stages are files, and makes them here in place of Ray Tune's trials."""

    def __init__(self, monkeypatch):
        self.made: list[str] = []
        self.broken: tuple[str, ...] = ()
        self.stop_after = 10**6
        monkeypatch.setattr(search, "plans", self.plans)
        monkeypatch.setattr(search, "estimates", self.estimates)
        monkeypatch.setattr(search, "_beside", lambda run: 2)
        monkeypatch.setattr(cluster.tuning, "run_trials", self.run_trials)

    def plans(self, run: Run, settings: list[Setting]) -> list[Plan]:
        return [self.plan(setting) for setting in settings]

    def plan(self, one: Setting) -> Plan:
        pruned = self.stage("prune", [one.depth], ())
        healed = self.stage("recover", [one.recovery], (pruned,)) if one.recovery != "none" else pruned
        model = self.stage("quantize", [one.quantizer], (healed,))
        share = 1.0 if one.depth == 0 else GOOD[one.recovery]
        screen, full = (self.stage("evaluate", [images, share], (model,)) for images in (12, 20))
        return Plan(one, model, screen, full, ())

    def stage(self, kind: str, settings: list, parents: tuple) -> Stage:
        def build(run: Run, folder, facts: dict) -> None:
            facts["removed"] = [1, 2] if settings == [2] else []
            if kind == "evaluate":
                images, share = settings
                rows = [
                    {"sample_id": f"{i}", "group": f"{i}", "baseline": float(i < share * images)} for i in range(images)
                ]
                write_table(folder / evaluate.ANSWERS, rows)
                facts["metrics"] = dict.fromkeys(("images", "answers"), images) | {"baseline_pct": 100 * share}
                facts["metrics"] |= {"baseline_interval_pct": [100 * share - 5, 100.0], "unanswered": 0}
                facts["metrics"] |= dict.fromkeys(("exact_pct", "name_accuracy", "name_accuracy_interval"), None)
                facts["profile"] = {"params": 10, "weight_bytes": 20, "device": "CPU", "threads": 1}
                facts["profile"] |= {"ms_per_token": 3.0, "ms_per_token_p5_p95": [2.0, 4.0], "first_token_ms": 9.0}
                facts["profile"] |= {"steady_peak_bytes": {"resident": 1}, "peak_memory_bytes": 2**30}

        return Stage(kind, 1, {"settings": settings}, parents, build)

    def estimates(self, run: Run, plans: list[Plan]) -> list[float]:
        return [GIB[plan.setting.quantizer] - 0.1 * plan.setting.depth for plan in plans]

    def run_trials(self, chains, maker, folder, log, on_event, loggers, sampled) -> dict:
        run = Run(load_config(None, [("run_dir", maker.kwargs["config"]["run_dir"]), *SPACE.items()]))
        ends = {}
        for key, tasks in chains.items():
            plan = next(self.plan(one) for one in space(run.config) if one.key == key)
            ends[key] = {"error": None}
            for task in tasks:
                stage = plan.find(task.name)
                if run.store.find(stage.name) is None:
                    if stage.kind in self.broken:
                        ends[key] = {"error": "The loss is nan at step 3"}
                        break
                    if len(self.made) >= self.stop_after:
                        raise Stopped
                    run.make(stage)
                    self.made.append(stage.name)
            on_event({"event": "trial", "key": key, "score": 50.0, **ends[key]})
        return ends


@pytest.fixture
def factory(monkeypatch):
    return Factory(monkeypatch)


def new_run(folder, **options: str) -> Run:
    given = {"run_dir": str(folder), **SPACE, **{key.replace("__", "."): value for key, value in options.items()}}
    return Run(load_config(None, list(given.items())))


def names(rows: list[dict], status: str) -> list[str]:
    return [row["setting"] for row in rows if row["status"] == status]


def test_every_stage_is_made_once_and_the_best_that_fits_is_the_answer(factory, tmp_path, capsys):
    search.job(new_run(tmp_path, search__budget__memory_gib="3.9"))
    rows = read_rows(new_run(tmp_path))
    assert [row["setting"] for row in rows] == [one.label for one in space(new_run(tmp_path).config)]
    assert names(rows, "over budget") == ["original", "lora"]
    assert names(rows, "screened out") == ["2 out", "2 out, awq 4 bit"]
    assert names(rows, "done") == ["awq 4 bit", "lora, awq 4 bit", "2 out, lora", "2 out, lora, awq 4 bit"]
    assert len(set(factory.made)) == len(factory.made)
    kinds = [name.partition("-")[0] for name in factory.made]
    assert (kinds.count("prune"), kinds.count("recover"), kinds.count("quantize")) == (2, 2, 6)
    assert kinds.count("evaluate") == 6 + 4  # the screen of six settings, four of which go on
    over, out, done = rows[0], rows[4], rows[-1]
    assert over["reason"] == "the estimate of 4 GiB is above 3.9 GiB" and over["score_pct"] is None
    assert re.match(r"2 out, lora takes no more and is better by 50\.0 \[", out["reason"]) and out["screen_pct"] == 50
    assert (out["baseline_pct"], out["screen_images"], done["images"], done["screen_images"]) == (None, 12, 20, 12)
    assert (done["removed_layers"], done["score_kind"], done["memory_kind"]) == ([1, 2], "baseline", "estimate")
    assert done["checkpoint"] == "artifacts/" + done["artifacts"][-2] and done["evaluation"] == done["artifacts"][-1]
    said = capsys.readouterr().out
    assert "answer for 3.9 GiB: 2 out, lora, awq 4 bit: 100.0" in said  # of equal scores the smallest
    assert "runner-up: awq 4 bit" in said and "difference: none, every answer has the same score" in said


def test_a_failed_stage_is_a_row_with_its_reason_and_the_others_go_on(factory, tmp_path, capsys):
    factory.broken = ("recover",)
    search.job(new_run(tmp_path))
    rows = read_rows(new_run(tmp_path))
    assert names(rows, "failed") == ["lora", "lora, awq 4 bit", "2 out, lora", "2 out, lora, awq 4 bit"]
    assert {row["reason"] for row in rows if row["status"] == "failed"} == {"The loss is nan at step 3"}
    assert len(names(rows, "done")) == 4  # without their rivals none loses in the screen
    assert "lora failed: The loss is nan at step 3" in capsys.readouterr().out


def comparable(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key not in (*MEASURED, "command")} for row in rows]


def test_a_stopped_search_goes_on_to_the_same_table_and_makes_nothing_twice(factory, tmp_path):
    search.job(new_run(tmp_path / "calm"))
    calm, factory.made = len(factory.made), []
    for stop in (3, 8, 15):
        factory.stop_after = stop
        with pytest.raises(Stopped):
            search.job(new_run(tmp_path / "stormy"))
    factory.stop_after = 10**6
    search.job(new_run(tmp_path / "stormy", search__resume="true"))
    assert len(factory.made) == len(set(factory.made)) == calm
    one, other = (comparable(read_rows(new_run(tmp_path / name))) for name in ("calm", "stormy"))
    assert one == other and all(row["status"] != "open" for row in one)


def test_another_budget_is_answered_from_the_rows(factory, tmp_path, capsys, monkeypatch):
    search.job(new_run(tmp_path))
    monkeypatch.setattr(search, "plans", lambda *_: pytest.fail("planned again"))
    capsys.readouterr()
    search.job(new_run(tmp_path, search__resolve_only="true", search__budget__memory_gib="0.9"))
    said = capsys.readouterr().out
    assert "answer for 0.9 GiB: 2 out, lora, awq 4 bit" in said and "no other setting fits" in said
    assert "leaves 0.1 GiB (11 %)" in said


@pytest.mark.parametrize("option", ["search__resume", "search__resolve_only"])
def test_there_is_nothing_to_go_on_with(tmp_path, option):
    with pytest.raises(ValueError, match="There is no search in run_dir"):
        search.job(new_run(tmp_path, **{option: "true"}))


def test_a_space_too_large_to_try_all_needs_a_screen(factory, tmp_path):
    with pytest.raises(ValueError, match=r"8 settings, more than search\.max_trials \(7\).*search\.screen_images"):
        search.job(new_run(tmp_path, search__max_trials="7", search__screen_images="null"))


def test_of_too_many_settings_those_that_were_suggested_are_rows(factory, tmp_path, monkeypatch):
    asked = []

    def suggest(chains, *rest) -> dict:
        asked.append(rest[-1])
        chosen = list(chains)[:3] if rest[-1] else list(chains)
        return factory.run_trials({key: chains[key] for key in chosen}, *rest)

    monkeypatch.setattr(cluster.tuning, "run_trials", suggest)
    options = {"search__max_trials": "7", "search__budget__memory_gib": "3.9"}
    search.job(new_run(tmp_path, **options))
    rows = read_rows(new_run(tmp_path))
    assert names(rows, "over budget") == ["original", "lora"] and len(rows) == 5
    assert asked[0].trials == 7 and asked[0].objectives["score"] == "max"
    assert asked[1:] == [None]  # the evaluation of those that were suggested is a grid
    made = len(factory.made)
    search.job(new_run(tmp_path, **options))  # Optuna is told what is finished, and suggests the same
    assert len(factory.made) == made and comparable(read_rows(new_run(tmp_path))) == comparable(rows)


def test_rows_of_other_methods_stay(factory, tmp_path):
    from jobs.search_rows import write_rows

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
    assert sums["stages"] == len(factory.made) == 2 + 2 + 8 + 8 + len(names(rows, "done"))
    manifests = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("artifacts/*/manifest.json")}
    apart = sum(manifests[name]["seconds"] for row in rows for name in row["artifacts"] if name in manifests)
    assert sums["seconds_apart"] == pytest.approx(apart, abs=0.5)  # each row is rounded
    assert sums["seconds"] == pytest.approx(sum(one["seconds"] for one in manifests.values()))
    assert sums["gpu_hours"] == sums["gpu_hours_apart"] == 0 and sums["busy_seconds"] == 0  # no log is written here


def test_seconds_in_which_something_was_being_made():
    assert busy([(10, 5), (0, 4), (3, 2), (11, 1), (20, 1)]) == 5 + 5 + 1
    assert busy([]) == 0


def test_parents_come_first_and_once(factory):
    stages = ordered([factory.plan(Setting(2, "lora", "awq", 4)).evaluation] * 2)
    assert [stage.kind for stage in stages] == ["prune", "recover", "quantize", "evaluate"]
