"""A search from plan to answer, its stages files that cost nothing; and killed while it searches in earnest."""

import re
import sys

import pytest

import cluster.tuning
from jobs import judge, search
from jobs.core import sources
from jobs.core.command import main
from jobs.core.options import load_config
from jobs.core.run import Run
from jobs.core.stage import Stage
from jobs.searching.rows import read_rows
from jobs.searching.space import space
from tests.jobs.searching import SPACE, Factory, Stopped, comparable, names, new_run


@pytest.fixture
def factory(monkeypatch):
    return Factory(monkeypatch)


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
    said, err = capsys.readouterr()
    report = tmp_path / "search" / "report.html"
    assert f"search: the report is {report}" in err and str(report) not in said  # where files are is no result
    assert "answer for 3.9 GiB: 2 out, lora, awq 4 bit: 100.0" in said  # of equal scores the smallest
    assert "runner-up: awq 4 bit" in said and "difference: none, every answer has the same score" in said


def test_the_hub_is_asked_once_and_the_others_are_told(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(sources, "hub_commit", lambda *given: asked.append(given) or 40 * "a")
    run = Run(load_config(None, [("run_dir", str(tmp_path)), ("model.path", "owner/name")]))
    inner = Run(run.config, parent_run=run)
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


def test_who_lost_to_a_setting_that_fails_later_goes_on(factory, tmp_path):
    factory.broken = ("2 out, lora", "lora")
    search.job(new_run(tmp_path))
    rows = read_rows(new_run(tmp_path))
    assert names(rows, "failed") == ["lora", "2 out, lora"]
    assert names(rows, "screened out") == ["2 out, awq 4 bit"]  # its rival is well
    assert "2 out" in names(rows, "done")
    assert len(set(factory.made)) == len(factory.made)


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
    search.job(new_run(tmp_path, **options))  # Optuna gets finished trials again, and suggests the same
    assert len(factory.made) == made and comparable(read_rows(new_run(tmp_path))) == comparable(rows)


def test_what_the_budget_leaves_of_a_large_space_is_tried_whole(factory, tmp_path):
    search.job(new_run(tmp_path, search__max_trials="6", search__budget__memory_gib="3.9"))  # 8, of which 6 fit
    assert len(read_rows(new_run(tmp_path))) == 8


def test_without_a_screen_the_original_needs_nothing_to_be_built(factory, tmp_path):
    search.job(new_run(tmp_path, search__screen_images="null"))
    assert names(read_rows(new_run(tmp_path)), "done")[0] == "original" and len(read_rows(new_run(tmp_path))) == 8


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
