"""A search from plan to answer, its stages files that cost nothing; and killed while it searches in earnest."""

import json
import re
import sys

import pytest

import cluster.tuning
from cluster.tables import write_table
from jobs import evaluate, judge, search
from jobs import run as run_module
from jobs.command import main
from jobs.config import Config
from jobs.options import load_config
from jobs.run import Run, Source, Stage
from jobs.search_rows import MEASURED, _gpu_hours, _memory, busy, read_log, read_rows, totals, write_log, write_rows
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
        model: Stage | Source = self.stage("quantize", [one.quantizer], (healed,))
        if one.label == "original":
            model = Source("model-1", "here")
        share = 1.0 if one.depth == 0 else GOOD[one.recovery]
        screen, full = (self.stage("evaluate", [images], (model,), share) for images in (12, 20))
        return Plan(one, model, screen, full, ())

    def stage(self, kind: str, settings: list, parents: tuple, share: float = 0.0) -> Stage:
        def build(run: Run, folder, facts: dict) -> None:
            facts["removed"] = [1, 2] if settings == [2] else []
            if kind == "evaluate":
                (images,) = settings
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
        run = Run(Config.model_validate(maker.kwargs["config"]))
        assert (run.folder / "artifacts" / "fingerprints.json").is_file()  # so that no maker reads the weights again
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


def test_the_hub_is_asked_once_and_the_others_are_told(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(run_module, "_hub_commit", lambda *given: asked.append(given) or 40 * "a")
    run = Run(load_config(None, [("run_dir", str(tmp_path)), ("model.path", "owner/name")]))
    inner = Run(run.config, home=run)
    assert run.base_model() == inner.base_model() == run.base_model() and asked == [("owner/name", None)]
    told = Run(run.resolved())
    assert told.config.model.revision == 40 * "a" and told.base_model() == run.base_model()
    here = Run(load_config(None, [("run_dir", str(tmp_path))]))
    assert here.resolved().model == here.config.model


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
    with pytest.raises(ValueError, match=r"8 settings are .* more than search\.max_trials \(7\).*screen_images"):
        search.job(new_run(tmp_path, search__max_trials="7", search__screen_images="null"))


def test_of_too_many_settings_those_that_were_suggested_are_rows(factory, tmp_path, monkeypatch):
    asked = []

    def suggest(chains, *rest) -> dict:
        asked.append(rest[-1])
        chosen = list(chains)[:3] if rest[-1] else list(chains)
        return factory.run_trials({key: chains[key] for key in chosen}, *rest)

    monkeypatch.setattr(cluster.tuning, "run_trials", suggest)
    options = {"search__max_trials": "5", "search__budget__memory_gib": "3.9"}
    search.job(new_run(tmp_path, **options))
    rows = read_rows(new_run(tmp_path))
    assert names(rows, "over budget") == ["original", "lora"] and len(rows) == 5
    assert asked[0].trials == 5 and asked[0].objectives["score"] == "max"
    assert asked[1:] == [None]  # the evaluation of those that were suggested is a grid
    made = len(factory.made)
    search.job(new_run(tmp_path, **options))  # Optuna is told what is finished, and suggests the same
    assert len(factory.made) == made and comparable(read_rows(new_run(tmp_path))) == comparable(rows)


def test_what_the_budget_leaves_of_a_large_space_is_tried_whole(factory, tmp_path):
    search.job(new_run(tmp_path, search__max_trials="6", search__budget__memory_gib="3.9"))  # 8, of which 6 fit
    assert len(read_rows(new_run(tmp_path))) == 8


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
    assert len(read_rows(new_run(tmp_path))) == 4 and "8 rows of other data" in capsys.readouterr().out


def test_without_a_screen_the_original_needs_nothing_to_be_built(factory, tmp_path):
    search.job(new_run(tmp_path, search__screen_images="null"))
    assert names(read_rows(new_run(tmp_path)), "done")[0] == "original" and len(read_rows(new_run(tmp_path))) == 8


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
    assert read_rows(new_run(tmp_path)) == [] and f"{len(rows)} rows of" in capsys.readouterr().out


def test_the_judges_score_stays_and_what_has_none_is_no_rival(factory, tmp_path, capsys, monkeypatch):
    """A search that the judge scored; then one without it, and with a setting more."""
    monkeypatch.setattr(search, "compared", lambda *_: {"difference_finding": None})
    run = new_run(tmp_path, search__depths="[0]", search__screen_images="null")
    search.job(run)
    controls = {"by_kind": {}, "unbuilt": []}
    verdict = {"is_llm_judge": True, "judge_interval_pct": [60.0, 80.0], "judgement": "judge-1", "judge": "Qwen"}
    verdict |= {
        "judge_identity": "a",
        "judge_scored": 20,
        "judge_total": 20,
        "judge_unscored": {},
        "judge_flagged": False,
    }
    verdict |= {"judge_controls": controls, "judge_agreement": None}
    judged = [{**row, **verdict, "judge_pct": 70.0} for row in read_rows(run)]
    write_rows(run, judged)
    assert {row["score_kind"] for row in read_rows(run)} == {"judge"}
    capsys.readouterr()
    search.job(new_run(tmp_path, search__screen_images="null"))
    rows = {row["setting"]: row for row in read_rows(run)}
    assert (rows["lora"]["score_pct"], rows["lora"]["judge_pct"]) == (70.0, 70.0)
    assert rows["2 out, lora"]["status"] == "done" and rows["2 out, lora"]["score_pct"] is None
    said = capsys.readouterr().out
    assert "4 evaluated settings are left out: the judge has not scored them" in said
    assert "LLM judge: Qwen, " in said and "80 of 80 answers scored, of 4 settings" in said and "not run" not in said
    first, *others = read_rows(run)
    write_rows(run, [{**first, "judge_identity": "b"}, *others])
    assert {row["score_kind"] for row in read_rows(run)} == {"baseline"}  # of two judges neither


def test_a_judge_that_cannot_be_is_told_of_before_anything_is_made(factory, tmp_path):
    with pytest.raises(ValueError, match=r"judge\.url"):
        search.job(new_run(tmp_path, judge__engine="openai"))
    assert factory.made == []


def test_all_that_was_evaluated_is_judged(factory, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(judge, "stage", lambda run, evaluated: Stage("judge", 1, {}, (evaluated,), lambda *_: None))
    monkeypatch.setattr(judge, "make_all", lambda run, done: asked.append(len(done)))
    monkeypatch.setattr(judge, "row", lambda *_: pytest.fail("nothing was judged"))
    search.job(new_run(tmp_path))
    url = "http://127.0.0.1:1/v1"
    search.job(new_run(tmp_path, judge__engine="openai", judge__url=url, search__budget__memory_gib="0.95"))
    assert asked == [len(names(read_rows(new_run(tmp_path)), "done"))]


def test_a_search_of_which_everything_failed_is_a_failure(factory, tmp_path):
    factory.broken = ("evaluate",)
    with pytest.raises(RuntimeError, match=r"All 8 settings that were tried failed; the first: The loss is nan"):
        search.job(new_run(tmp_path))
    assert (tmp_path / "search" / "report.html").is_file()


def test_an_unfinished_search_says_so_when_it_is_resolved(factory, tmp_path, capsys):
    factory.stop_after = 12
    with pytest.raises(Stopped):
        search.job(new_run(tmp_path))
    count = len(names(read_rows(new_run(tmp_path)), "open"))
    search.job(new_run(tmp_path, search__resolve_only="true"))
    assert count > 0 and f"{count} settings are not finished" in capsys.readouterr().out


def test_resolving_leaves_the_recorded_config_alone(factory, tmp_path, monkeypatch):
    def command(*words: str) -> str:
        given = {"run_dir": str(tmp_path), **SPACE}
        options = [word for key, value in given.items() for word in (f"--{key}", value)]
        monkeypatch.setattr(sys, "argv", ["search", *options, *words])
        main("", search.job, {"resolve-only": "search.resolve_only"}, lambda config: not config.search.resolve_only)
        return (tmp_path / "config.search.yaml").read_text()

    before = command()
    assert command("--resolve-only", "--search.budget.memory_gib", "1") == before
    assert command("--search.budget.memory_gib", "1") != before


def test_the_memory_of_several_gpus_is_that_of_the_fullest():
    profile = {"steady_peak_bytes": {"allocated": 1, "fullest": 2**30, "driver": 3 * 2**29}}
    assert _memory(profile, 9.0, False) == {"memory_gib": 1.0, "memory_kind": "GPU, driver, the fullest"}
    del profile["steady_peak_bytes"]["fullest"]
    assert _memory(profile, 9.0, True) == {"memory_gib": 1.5, "memory_kind": "GPU, driver"}
    assert _memory({"steady_peak_bytes": {"resident": 5}}, 9.0, True)["memory_kind"] == "estimate, packed"


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


def test_seconds_in_which_something_was_being_made():
    assert busy([(10, 5), (0, 4), (3, 2), (11, 1), (20, 1)]) == 5 + 5 + 1
    assert busy([]) == 0


def test_parents_come_first_and_once(factory):
    stages = ordered([factory.plan(Setting(2, "lora", "awq", 4)).evaluation] * 2)
    assert [stage.kind for stage in stages] == ["prune", "recover", "quantize", "evaluate"]
