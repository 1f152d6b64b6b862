"""What settings retain of the original's score, against what they removed: the second paper's main figures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from jobs.core.text import with_interval
from jobs.scoring.metrics import compute_retention
from jobs.scoring.rows import AnswerRow
from jobs.searching.table import SearchRow

ORIGINAL = "nothing removed, not recovered"


@dataclass(frozen=True)
class Retained:
    """One setting. line: its way to prune and to recover.

    removed: share of the parameters (%); retained: share of the original's baseline score (%), low, high: its 95 %
    interval, with the image as the unit.
    """

    setting: str
    line: str
    removed: float
    retained: float
    low: float
    high: float

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """The row of a table: way, setting, removed, retained."""
        return (
            *(self.line, self.setting, f"{self.removed:.1f}"),
            with_interval(self.retained, [self.low, self.high]),
        )


def retained_points(rows: Sequence[SearchRow], answers: Callable[[str], Mapping[str, AnswerRow]]) -> list[Retained]:
    """Return the evaluated settings without a quantizer, by line and by what they removed; [] without the original.

    answers: from an evaluation's name to its answers by sample_id.
    """
    uniform = [row for row in rows if row["method"] == "uniform" and row["quantizer"] == "none"]
    whole = [row for row in uniform if row["status"] == "done"]
    original = next((row for row in whole if _line(row) == ORIGINAL), None)
    if original is None:
        return []
    before = answers(original["evaluation"])
    points = []
    for row in whole:
        after = answers(row["evaluation"])
        common = [sample for sample in after if sample in before]
        found = compute_retention(
            [after[s]["baseline"] for s in common],
            [before[s]["baseline"] for s in common],
            [before[s]["group"] for s in common],
        )
        if row is not original and found["interval_pct"] is not None:
            removed = 100 * (1 - row["params"] / original["params"])
            points.append(Retained(row["setting"], _line(row), removed, found["pct"], *found["interval_pct"]))
    return sorted(points, key=lambda point: (point.line, point.removed))


def _line(row: SearchRow) -> str:
    ways = (["layers"] if row["depth"] else []) + (["width"] if row.get("width", 1.0) < 1 else [])
    recovery = "not recovered" if row["recovery"] == "none" else row["recovery"]
    return f"{' and '.join(ways) or 'nothing removed'}, {recovery}"


def format_points(points: Sequence[Retained]) -> str:
    """Return the points as a table in Markdown."""
    lines = ["| pruned, recovered | setting | parameters removed % | score retained % |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(point.cells)} |" for point in points)]) + "\n"
