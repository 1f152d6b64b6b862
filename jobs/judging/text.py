"""The judge's tables and findings in words."""

from collections.abc import Mapping

from jobs.judging.tables import percent


def format_rows(rows: Mapping[str, Mapping], compared: Mapping[str, Mapping] | None = None) -> str:
    """Return judged tables as text for a terminal; `compared`: their differences to the first."""
    width = max(16, *map(len, rows))
    layout = f"{{:<{width}}} {{:>11}} {{:>16}} {{:>14}} {{:>10}}  {{}}"
    heads = ("answers", "scored", "judge %", "bounds", "expected %", "against the first" if compared else "")
    lines = [layout.format(*heads)]
    for name, columns in rows.items():
        bounds = "-" if columns["judge_bounds_pct"] is None else "[{:.1f}, {:.1f}]".format(*columns["judge_bounds_pct"])
        expected = "-" if columns["judge_expected_pct"] is None else f"{columns['judge_expected_pct']:.1f}"
        scored = f"{columns['judge_scored']}/{columns['judge_total']}"
        verdict = finding((compared or {}).get(name, {}))
        lines.append(layout.format(name, scored, percent(columns), bounds, expected, verdict))
    return "\n".join(line.rstrip() for line in lines)


def finding(difference: Mapping) -> str:
    """Put a difference into words."""
    outcome = difference.get("judge_difference_finding")
    if outcome in (None, "identical"):
        return outcome or ""
    low, high = difference["judge_difference_interval_pct"]
    words = f"{outcome}: {difference['judge_difference_pct']:+.1f} [{low:+.1f}, {high:+.1f}]"
    words += f", p {difference['judge_difference_p_holm']:.2g}"
    detectable = difference["judge_difference_detectable_pct"]
    return words + (f", detectable {detectable:.1f}" if detectable is not None else "")
