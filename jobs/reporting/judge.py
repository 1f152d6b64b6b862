"""The judge's section of the report."""

from collections import Counter
from collections.abc import Mapping, Sequence

from actors.judge.verdict import MAX_UNSCORED
from jobs.judging.agreement import sentence
from jobs.judging.text import finding


def describe_verdicts(rows: Sequence[Mapping]) -> dict:
    """Return the judge's section; rows: those of the summary, all of them judged."""
    reasons = sum((Counter(row["judge_unscored"]) for row in rows), Counter())
    return {
        "name": rows[0]["judge"],
        "agreement": sentence(rows[0]["judge_agreement"]),
        "flagged": any(row["judge_flagged"] for row in rows),
        "missed": [line for row in rows if (line := _missed(row))],
        "rows": [{**row, "difference_text": finding(row)} for row in rows],
        "most_unscored_pct": 100 * MAX_UNSCORED,
        "unscored": ", ".join(f"{count} {kind}" for kind, count in sorted(reasons.items())),
        "unbuilt": sorted({kind for row in rows for kind in row["judge_controls"]["unbuilt"]}),
    }


def _missed(row: Mapping) -> str:
    kinds = row["judge_controls"]["by_kind"].items()
    missed = [f"{kind} {counts['missed']} of {counts['count']}" for kind, counts in kinds if counts["missed"]]
    return f"{row['method']}: {', '.join(missed)}" if missed else ""
