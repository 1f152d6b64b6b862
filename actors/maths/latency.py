"""The efficiency protocol's arithmetic: from clock readings to phases, medians and percentiles, in milliseconds."""

import statistics
from collections.abc import Sequence

from actors.maths.columns import Number


def run_times(started: float, prepared: float, encode: float, ticks: Sequence[float]) -> dict[str, float]:
    """Return one run's times (ms) from clock readings (s).

    started: before the image is preprocessed; prepared: tensors are on the device; encode: seconds within tower and
    projector; ticks: when each of n new tokens was known. total = preprocess + encode + prefill + decode;
    first_token = encode + prefill; ms_per_token = (end to end - first_token) / (n - 1), where end to end begins at
    `prepared`; naive_ms_per_token = end to end / n, which is what the paper's column is.
    """
    first, decode = ticks[0] - prepared, ticks[-1] - ticks[0]
    seconds = {
        "preprocess_ms": prepared - started,
        "encode_ms": encode,
        "prefill_ms": first - encode,
        "first_token_ms": first,
        "decode_ms": decode,
        "total_ms": ticks[-1] - started,
        "ms_per_token": decode / (len(ticks) - 1),
        "naive_ms_per_token": (first + decode) / len(ticks),
    }
    return {name: 1e3 * value for name, value in seconds.items()}


def summary(runs: Sequence[dict[str, float]]) -> dict:
    """Return the median of every time (ms), and under `<time>_p5_p95` its 5th and 95th percentile."""
    row: dict = {}
    for name in runs[0]:
        values = [run[name] for run in runs]
        row |= {name: statistics.median(values), f"{name}_p5_p95": p5_p95(values)}
    return row


def p5_p95(values: Sequence[float]) -> list[float]:
    """Return the 5th and the 95th percentile (inclusive); a single value is its own."""
    if len(values) < 2:
        return [values[0], values[0]]
    cuts = statistics.quantiles(values, n=20, method="inclusive")
    return [cuts[0], cuts[-1]]


def cover_time(spans: Sequence[tuple[Number, Number]]) -> float:
    """Return the time that spans of (start, length) cover together, in their unit."""
    covered, end = 0.0, float("-inf")
    for start, length in sorted(spans):
        covered += max(0.0, start + length - max(start, end))
        end = max(end, start + length)
    return covered


def merge_rounds(rounds: Sequence[dict]) -> dict:
    """Return one row from the rounds of one checkpoint (`LlavaReplica.profile`), each from a process of its own.

    Times are summarised over the runs of all rounds; of memory (bytes) the largest round counts.
    `ms_per_token_rounds` has the median of each round: how far processes differ.
    """
    runs = [run for row in rounds for run in row["runs"]]
    row = {name: value for name, value in rounds[0].items() if name != "runs"}
    for name in (name for name in row if name.endswith("_peak_bytes") or name == "baseline_bytes"):
        row[name] = {kind: max(other[name][kind] for other in rounds) for kind in row[name]}
    row["peak_memory_bytes"] = max(other["peak_memory_bytes"] for other in rounds)
    per_round = [statistics.median(run["ms_per_token"] for run in other["runs"]) for other in rounds]
    return {**row, **summary(runs), "timed_runs": len(runs), "rounds": len(rounds), "ms_per_token_rounds": per_round}
