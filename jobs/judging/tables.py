"""Tables of answers with their verdicts: their columns, their headline (the judge's percentage), their controls."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import cast

from actors.judge.cache import JudgeIdentity
from actors.judge.controls import Control, controls, misses, unbuilt
from actors.judge.verdict import TOP_LABEL, tally
from actors.maths.columns import number_names, to_percent
from actors.maths.statistics import average, bootstrap_mean
from jobs.core.run import Run
from jobs.judging.agreement import sentence
from jobs.judging.asking import BAD_OUTPUT, KeyedVerdict, Text, judge_columns, verdicts
from jobs.judging.rows import JudgedColumns, VerdictRow

ANSWER_COLUMNS = ("sample_id", "question_id", "image", "group", "class", "question", "reference", "answer")
NOT_JUDGED = {**dict.fromkeys(JudgedColumns.__annotations__), "is_llm_judge": False}


@dataclass(frozen=True)
class JudgedTable:
    """Answers with their verdicts, one row each; and tally, controls and judge of the table, as plain values."""

    rows: list[VerdictRow]
    facts: Mapping

    @property
    def labels(self) -> dict[str, int | None]:
        """The labels by sample_id; none where the table has no headline."""
        if self.facts["tally"]["judge_pct"] is None:
            return {}
        return {row["sample_id"]: row["judge_label"] for row in self.rows}


def judged_tables(
    run: Run, tables: Mapping[str, Sequence[Mapping]]
) -> tuple[dict[str, JudgedTable], dict[Text, KeyedVerdict], JudgeIdentity]:
    """Judge all rows of all tables, and the controls of each, in one session.

    The judge sees question, reference and answer, nothing else. Returns the tables, every verdict, and the judge.
    """
    controls_of = {name: controls(rows, run.config.judge.controls, run.config.seed) for name, rows in tables.items()}
    texts = [_control_text(control) for group in controls_of.values() for control in group]
    texts += [_text(row) for rows in tables.values() for row in rows]
    verdict_of, identity = verdicts(run, texts)
    judged = {}
    for name, rows in tables.items():
        table_verdicts, group = [verdict_of[_text(row)] for row in rows], controls_of[name]
        facts = {
            "tally": _tally(rows, table_verdicts),
            "unscored": _failures(table_verdicts),
            "controls": _control_facts(group, [verdict_of[_control_text(control)] for control in group]),
            "judge": run.config.judge.model,
            "identity": asdict(identity),
        }
        columns = [{key: row[key] for key in ANSWER_COLUMNS if key in row} for row in rows]
        judged_rows = [
            cast(VerdictRow, row | judge_columns(verdict)) for row, verdict in zip(columns, table_verdicts, strict=True)
        ]
        judged[name] = JudgedTable(judged_rows, facts)
    return judged, verdict_of, identity


def may_be_asked_again(facts: Mapping) -> bool:
    """Tell whether a table lacks verdicts that another try may bring.

    The judge would repeat bad output, and refuse again what it refused (too long). But where so many were refused that
    there is no headline, it may accept longer prompts by now.
    """
    final = {BAD_OUTPUT} if facts["tally"]["judge_pct"] is None else {BAD_OUTPUT, "refused"}
    return bool({*facts["unscored"], *facts["controls"]["unscored"]} - final)


def _failures(judged: Sequence[KeyedVerdict]) -> dict[str, int]:
    return dict(Counter(verdict.failure for verdict in judged if verdict.failure))


def clusters(rows: Sequence[Mapping]) -> tuple[list[str], str]:
    """Return each row's cluster (its series, else its image, else itself), and the kind that most clusters have."""
    units = [next((unit for unit in ("group", "image") if row.get(unit) is not None), "answer") for row in rows]
    names = []
    for number, (unit, row) in enumerate(zip(units, rows, strict=True)):
        names.append(f"{unit} {number if unit == 'answer' else row[unit]}")
    return names, max(("group", "image", "answer"), key=units.count)


def _text(row: Mapping) -> Text:
    return row["question"], row["reference"], row["answer"]


def _control_text(control: Control) -> Text:
    return control.question, control.reference, control.candidate


def _tally(rows: Sequence[Mapping], verdicts_N: Sequence[KeyedVerdict]) -> dict:
    """Return the tally of labels with its interval, which is None where there is no headline."""
    labels = [keyed.verdict.label for keyed in verdicts_N]
    summary = tally(labels)
    names, unit = clusters(rows)
    interval = expected = None
    if summary["judge_pct"] is not None:
        scored = [(label, name) for label, name in zip(labels, names, strict=True) if label is not None]
        points = to_percent([label for label, _ in scored], TOP_LABEL)
        interval = list(bootstrap_mean(points, number_names([name for _, name in scored]))[1:])
        means = [keyed.verdict.expected for keyed in verdicts_N if keyed.verdict.expected is not None]
        if len(means) == len(scored):  # of all scored answers, or none: a mean over a part would be biased
            expected = 100 / TOP_LABEL * average(means)
    return {
        **summary,
        "judge_interval_pct": interval,
        "judge_expected_pct": expected,
        "clusters": len(set(names)),
        "unit": unit,
    }


def _control_facts(built: Sequence[Control], judged: Sequence[KeyedVerdict]) -> dict:
    missed = misses(built, [keyed.verdict.label for keyed in judged])
    return {
        "count": len(built),
        "missed": len(missed),
        "by_kind": {
            kind: {"count": count, "missed": sum(miss.control.kind == kind for miss in missed)}
            for kind, count in Counter(control.kind for control in built).items()
        },
        "misses": [{**asdict(miss.control), "label": miss.label} for miss in missed],
        "unbuilt": unbuilt(built),
        "unscored": _failures(judged),
    }


def summary_columns(facts: Mapping, calibration: dict | None) -> JudgedColumns:
    """Return what a table of results says about one judged table."""
    counts = facts["tally"]
    return {
        "is_llm_judge": True,
        "judge": facts["judge"],
        "judge_pct": counts["judge_pct"],
        "judge_interval_pct": counts["judge_interval_pct"],
        "judge_bounds_pct": counts["judge_bounds_pct"],
        "judge_expected_pct": counts["judge_expected_pct"],
        "judge_scored": counts["scored"],
        "judge_total": counts["total"],
        "judge_unscored": facts["unscored"],
        "judge_flagged": facts["controls"]["missed"] > 0,
        "judge_controls": {key: value for key, value in facts["controls"].items() if key != "misses"},
        "judge_calibrated": calibration is not None,
        "judge_agreement": calibration,
    }


def percent(row: Mapping) -> str:
    """Return a judged row's headline for a terminal: with its interval, or why there is none; ! flags the run."""
    flag = "!" if row["judge_flagged"] else ""
    if row["judge_pct"] is None:
        return f"none{flag}"
    low, high = row["judge_interval_pct"]
    return f"{row['judge_pct']:.1f} [{low:.0f}, {high:.0f}]{flag}"


def flag(row: Mapping) -> str:
    """Return "!" if a row is compared by the score of a judge that failed its controls, else nothing."""
    return "!" if row["score_kind"] == "judge" and row["judge_flagged"] else ""


def by_baseline(rows: Mapping[str, Mapping]) -> list[str]:
    """Say which judged rows (by name) have no headline, so that all rows are compared by the baseline; or []."""
    without = [name for name, row in rows.items() if row["is_llm_judge"] and row["judge_pct"] is None]
    return [f"no headline for {', '.join(without)}, so all are compared by the baseline"] if without else []


def remarks(rows: Sequence[Mapping]) -> list[str]:
    """Return the sentences that belong below every table of judged rows."""
    lines = [f"LLM judge: {rows[0]['judge']}, {sentence(rows[0]['judge_agreement'])}"]
    if any(row["judge_pct"] is None for row in rows):
        lines.append("none: more than 2 % of the answers are UNSCORED, so there are only bounds")
    reasons = sum((Counter(row["judge_unscored"]) for row in rows), Counter())
    if reasons:
        lines.append("UNSCORED: " + ", ".join(f"{count} {kind}" for kind, count in sorted(reasons.items())))
    worst: dict[str, dict] = {}  # most tables have the same controls, so they are not added up
    for row in rows:
        for kind, counts in row["judge_controls"]["by_kind"].items():
            worst[kind] = max(worst.get(kind, counts), counts, key=lambda kind_counts: kind_counts["missed"])
    missed = [f"{kind} {counts['missed']} of {counts['count']}" for kind, counts in worst.items() if counts["missed"]]
    if missed:
        lines.append(f"! FLAGGED: the judge failed controls and is not to be trusted: {', '.join(missed)}")
    unbuilt = sorted({kind for row in rows for kind in row["judge_controls"]["unbuilt"]})
    if unbuilt:
        lines.append(f"controls that these answers do not allow: {', '.join(unbuilt)}")
    return lines
