"""Judged evaluations, with a judge that needs no model: the stage, its controls, the summary's columns."""

import json

import numpy as np
import pytest

from actors.judge.calls import Failure
from cluster.tables import read_table
from jobs import compress, judge
from jobs.core.stage import Source, Stage
from jobs.judging.tables import (
    NOT_JUDGED,
    clusters,
    judged_tables,
    may_be_asked_again,
    percent,
    remarks,
    summary_columns,
)
from jobs.reporting import judge as report_judge
from jobs.reporting.pages import render_page
from tests.jobs.judging import (
    Mock,
    answer_rows,
    evaluation,
    fair,
    hurried,  # noqa: F401 (a fixture)
    run_in,
)
from tests.jobs.pages import content


def test_evaluations_are_judged_in_one_session_and_only_once(tmp_path, monkeypatch):
    """Six models, one start of the judge; equal answers are asked once; the artifact has what the report reads."""
    mock = Mock().install(monkeypatch)
    run = run_in(tmp_path)
    shares = (1.0, 0.9, 0.5, 1.0, 0.5, 0.0)
    models = [evaluation(run, str(n), answer_rows(right=share, seed=n)) for n, share in enumerate(shares)]
    stages = judge.make_all(run, models)
    assert mock.sessions == 1 and len(mock.asked) == len(set(mock.asked))
    assert all("which model" not in "".join(text) for text in mock.asked)
    assert [one.kind for one in stages] == ["judge"] * 6 and stages[0].parents == (models[0],)
    rows, facts = read_table(run.store.root / stages[2].name / judge.VERDICTS), run.facts(stages[2])
    assert {*rows[0]} == {
        *("sample_id", "question_id", "image", "group", "class", "question", "reference", "answer"),
        *("judge_label", "judge_reason", "judge_expected", "judge_label_mass", "judge_raw", "judge_tries", "judge_key"),
    }
    assert all(row["judge_label"] == fair(row["question"], row["reference"], row["answer"]) for row in rows)
    assert facts["tally"]["scored"] == 36 and facts["tally"]["unit"] == "group" and facts["tally"]["clusters"] == 12
    assert facts["controls"]["count"] == 8 * 7 and facts["controls"]["missed"] == 0 and facts["calibrated"] is False
    calls = len(mock.asked)
    judge.make_all(run_in(tmp_path), models)
    for one in models:
        run_in(tmp_path).make(judge.stage(run, one))
    assert (mock.sessions, len(mock.asked)) == (1, calls)


def test_one_evaluation_alone_is_a_stage_like_any_other(tmp_path, monkeypatch):
    Mock().install(monkeypatch)
    run = run_in(tmp_path)
    made = judge.stage(run, evaluation(run, "a", answer_rows()))
    assert (run.store.root / made.name / judge.VERDICTS).exists() is False
    run.make(made)
    assert judge.row(run, made)["judge_pct"] == 100 and len(judge.labels(run, made)) == 36
    other = judge.stage(run_in(tmp_path, ("judge.controls", "3")), evaluation(run, "a", answer_rows()))
    assert other.name != made.name


def test_what_was_not_reached_is_judged_again_and_bad_output_is_not(tmp_path, monkeypatch, hurried):  # noqa: F811
    """One answer is refused, one never gets a schema's output: the next job asks for the first alone."""
    rows = answer_rows()
    broken = {rows[0]["reference"]: "refused", rows[1]["reference"]: "bad"}
    where = {"fail": True}

    def before(question, reference, candidate):
        kind = broken.get(reference) if where["fail"] and candidate.endswith(" ?") else None
        return Failure("refused", "too long") if kind == "refused" else None

    def label(question, reference, candidate):
        return (
            9 if broken.get(reference) == "bad" and candidate.endswith(" ?") else fair(question, reference, candidate)
        )

    for row in rows[:2]:
        row["answer"] += " ?"
    mock = Mock(label, before).install(monkeypatch)
    run = run_in(tmp_path)
    made = evaluation(run, "a", rows)
    (stage,) = judge.make_all(run, [made])
    assert run.facts(stage)["unscored"] == {"refused": 1, "bad_output": 1}
    assert run.facts(stage)["tally"]["judge_pct"] is None, "2 of 36 are more than 2 %"
    bounds = [100 * (34 * 4 + missing) / 144 for missing in (0, 8)]
    assert run.facts(stage)["tally"]["judge_bounds_pct"] == pytest.approx(bounds)
    unscored = [r for r in read_table(run.store.root / stage.name / judge.VERDICTS) if r["judge_label"] is None]
    assert len(unscored) == 2 and all(row["judge_reason"] for row in unscored)
    where["fail"] = False
    judge.make_all(run, [made])
    assert run.facts(stage)["unscored"] == {"bad_output": 1} and mock.sessions == 2
    assert run.facts(stage)["tally"]["scored"] == 35
    judge.make_all(run, [made])
    assert mock.sessions == 2


@pytest.mark.parametrize(
    ("unscored", "headline", "again"),
    [
        ({}, 90.0, False),
        ({"timeout": 1}, 90.0, True),
        ({"refused": 1, "bad_output": 1}, 90.0, False),
        ({"refused": 50}, None, True),
        ({"denied": 1}, 90.0, True),
        ({"bad_output": 50}, None, False),
    ],
)
def test_which_tables_are_judged_again(unscored, headline, again):
    """Not for one answer that is too long, but if most were refused."""
    facts = {"tally": {"judge_pct": headline}, "unscored": unscored, "controls": {"unscored": {}}}
    assert may_be_asked_again(facts) is again
    assert may_be_asked_again({**facts, "controls": {"unscored": {"closed": 1}}})  # a miss that is none of the judge's


def test_a_judge_that_fails_its_controls_flags_the_run(tmp_path, monkeypatch):
    """It gives 4 to everything: only the references are as they must be."""
    Mock(lambda *_: 4).install(monkeypatch)
    run = run_in(tmp_path)
    made, _, _ = judged_tables(run, {"a": answer_rows()})
    facts = made["a"].facts
    assert facts["controls"]["by_kind"]["reference"] == {"count": 8, "missed": 0}
    assert facts["controls"]["by_kind"]["fake_verdict"] == {"count": 8, "missed": 8}
    assert facts["controls"]["missed"] == 48 == len(facts["controls"]["misses"])
    row = summary_columns(facts, None)
    assert row["judge_flagged"] is True and percent(row).endswith("!")
    said = "\n".join(remarks([row]))
    assert "FLAGGED" in said and "other_class 8 of 8" in said and "reference" not in said and "uncalibrated" in said
    told = report_judge.describe_verdicts(
        [{"method": "original", **row, "judge_retention": None, "judge_given_name": None}]
    )
    page = render_page("report.html.j2", {**content(tmp_path), "judge": told})
    assert "This judged run is flagged" in page and "original: other_class 8 of 8, empty 8 of 8" in page


def test_intervals_resample_images(tmp_path, monkeypatch):
    """Twelve images of three equal verdicts: the interval is that of twelve verdicts, not of thirty-six."""
    Mock().install(monkeypatch)
    rows = answer_rows(right=0.5)
    run = run_in(tmp_path)
    alone = [{key: value for key, value in row.items() if key not in ("group", "image")} for row in rows]
    made, _, _ = judged_tables(run, {"images": rows, "answers": alone})
    wide, narrow = (made[name].facts["tally"] for name in ("images", "answers"))
    assert (wide["unit"], narrow["unit"], narrow["clusters"]) == ("group", "answer", 36)
    width, other = (np.diff(one["judge_interval_pct"])[0] for one in (wide, narrow))
    assert width == pytest.approx(other * 3**0.5, rel=0.2)
    assert wide["judge_expected_pct"] == pytest.approx(
        100 * np.mean([e["judge_expected"] for e in made["images"].rows]) / 4
    )


def test_a_row_without_a_series_belongs_to_its_image():
    rows = [
        {"group": "s", "image": "a"},
        *[{"group": None, "image": name} for name in ("b", "b", "s")],
        {"image": None},
    ]
    names, unit = clusters(rows)
    assert names == ["group s", "image b", "image b", "image s", "answer 4"] and unit == "image"
    assert clusters([{}, {}]) == (["answer 0", "answer 1"], "answer")


def compared(tmp_path, monkeypatch, shares, engine="transformers") -> list[dict]:
    Mock().install(monkeypatch)
    run = run_in(tmp_path, ("judge.engine", engine))
    answers = [answer_rows(40, share, seed=n) for n, share in enumerate(shares)]
    planned = {str(n): (None, evaluation(run, str(n), rows)) for n, rows in enumerate(answers)}
    if engine != "none":
        judge.make_all(run, [evaluated for _, evaluated in planned.values()])
    tables = [{row["sample_id"]: row for row in rows} for rows in answers]
    return compress._compare_methods(run, tables, compress.judgements(run, planned))


def test_summary_columns_of_judged_models(tmp_path, monkeypatch):
    """The original, its equal, one that lost half of the images, one that lost a few: identical, worse, unresolved."""
    rows = compared(tmp_path, monkeypatch, (1.0, 1.0, 0.5, 0.97))
    assert all(row["is_llm_judge"] is True and row["judge_calibrated"] is False for row in rows)
    assert all(row["judge_scored"] == row["judge_total"] == 120 and row["judge_flagged"] is False for row in rows)
    assert [row["judge_difference_finding"] for row in rows] == [None, "identical", "worse", "unresolved"]
    assert [row["difference_finding"] for row in rows] == [None, "identical", "worse", "unresolved"]
    assert rows[0]["judge_difference_pct"] == rows[1]["judge_difference_pct"] == 0
    assert rows[1]["judge_difference_detectable_pct"] is None and rows[3]["judge_difference_detectable_pct"] > 0
    columns = {"params": 1, "bits": 4, "nominal_bytes": 1, "simulated": False}
    columns |= dict.fromkeys(("name_accuracy", "name_accuracy_interval"))
    columns |= {
        "baseline_pct": 1.0,
        "baseline_interval_pct": [0, 2],
        "exact_pct": 1.0,
        "ms_per_token": 1.0,
        "images": 40,
    }
    columns |= {"answers": 120, "device": "cpu", "threads": 1, "unanswered": 0, "judge_failure": None}
    said = compress.format_rows([columns | row | {"method": f"m{n}"} for n, row in enumerate(rows)])
    lines = [line.split() for line in said.splitlines()]
    judged = {line[0]: line for line in lines[lines.index(next(line for line in lines if "judge" in line)) :]}
    assert judged["m0"][1:7] == ["120/120", "100.0", "[100,", "100]", "[100.0,", "100.0]"] and "not run" not in said
    assert "worse:" in judged["m2"] and "detectable" in judged["m2"] and "identical" in judged["m1"]
    assert "uncalibrated" in said and "FLAGGED" not in said
    assert rows[0]["judge_retention"] == {"pct": 100, "interval_pct": [100, 100]}
    kept = rows[2]["judge_retention"]
    assert kept["pct"] == pytest.approx(100 * rows[2]["judge_pct"] / rows[0]["judge_pct"])
    assert kept["interval_pct"][0] < kept["pct"] < kept["interval_pct"][1] < 100
    lost = rows[2]
    assert lost["judge_difference_pct"] == pytest.approx(lost["judge_pct"] - rows[0]["judge_pct"])
    low, high = lost["judge_difference_interval_pct"]
    assert low < lost["judge_difference_pct"] < high < 0
    assert lost["name_p_holm"] < 0.05 < rows[3]["name_p_holm"] and rows[0]["name_p_holm"] is None


def test_a_judge_out_of_reach_ends_the_job_after_its_table(tmp_path, monkeypatch, capsys, hurried):  # noqa: F811
    """Summary and table say that the judge failed; once it is back, the same command brings its scores."""
    mock = Mock(before=lambda *_: Failure("closed", "nobody listens")).install(monkeypatch)
    run, pruned = run_in(tmp_path), Stage("prune", 0, {}, (), lambda r, folder, facts: facts.update(removed=[3]))
    run.make(pruned)
    metrics = dict.fromkeys(("baseline_pct", "exact_pct", "macro_f1_pct", "images", "answers", "unanswered"), 1)
    metrics |= {"baseline_interval_pct": [0, 2], "macro_f1_interval_pct": [0, 2]}
    metrics |= dict.fromkeys(("without_stop_pct", "without_stop_interval_pct", "loop_pct", "loop_interval_pct"))
    metrics |= dict.fromkeys(("name_accuracy", "name_accuracy_interval"))
    profile = dict.fromkeys(("params", "weight_bytes", "stored_bits", "peak_memory_bytes", "threads"), 1)
    profile |= dict.fromkeys(("peak_memory_kind", "device"), "CPU") | {"ms_per_token": 1.0, "first_token_ms": 1.0}
    profile |= {"ms_per_token_p5_p95": [1.0, 1.0]}
    found = {"metrics": metrics, "profile": profile, "controls": {}}
    planned = {
        "original": (Source("model-a", "/nowhere"), evaluation(run, "a", answer_rows(), **found)),
        "prune": (pruned, evaluation(run, "b", answer_rows(right=0.5), **found)),
    }
    monkeypatch.setattr(compress, "plan", lambda _: planned)
    monkeypatch.setattr(compress, "retention", lambda *_: {})
    monkeypatch.setattr(compress, "studies", lambda _: [])
    with pytest.raises(RuntimeError, match=r"does not answer .*nobody listens"):
        compress.job(run)
    rows, said = json.loads((tmp_path / compress.SUMMARY).read_text()), capsys.readouterr().out
    assert [row["method"] for row in rows] == ["original", "prune"] and rows[0]["is_llm_judge"] is False
    assert all(row["judge_pct"] is None and "nobody listens" in row["judge_failure"] for row in rows)
    assert "LLM judge: FAILED, no scores: The judge" in said and "not run" not in said
    mock.before = None
    compress.job(run)
    rows, said = json.loads((tmp_path / compress.SUMMARY).read_text()), capsys.readouterr().out
    assert rows[0]["judge_pct"] == 100 > rows[1]["judge_pct"] and rows[0]["judge_failure"] is None
    assert "FAILED" not in said and "uncalibrated" in said


def test_what_is_retained_of_the_judges_labels():
    """On the answers that have a label on both sides: 2 + 4 of 4 + 4; None where there are none."""
    first, labels = {"a": 4, "b": 4, "c": 2, "d": None}, {"a": 2, "b": 4, "c": None, "d": 4, "e": 4}
    groups = dict.fromkeys("abcde", "one image")
    assert compress._judge_retention(first, labels, groups) == {"pct": 75.0, "interval_pct": [75.0, 75.0]}
    assert compress._judge_retention(first, {"c": None, "d": 4}, groups) is None
    assert compress._judge_retention({}, labels, groups) is None


def test_summary_columns_without_a_judge(tmp_path, monkeypatch):
    """Everything about a judge is null, the baseline's differences are there."""
    rows = compared(tmp_path, monkeypatch, (1.0, 0.5), engine="none")
    assert {key: rows[1][key] for key in NOT_JUDGED} == NOT_JUDGED and rows[1]["is_llm_judge"] is False
    assert rows[1]["judge_difference_pct"] is None and rows[1]["judge_difference_finding"] is None
    assert rows[1]["difference_finding"] == "worse" and set(rows[0]) == set(rows[1])
