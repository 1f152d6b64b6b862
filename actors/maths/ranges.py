"""Which channels of a linear's input are outliers (paper, figure 4): their largest |x| against the channels' median."""

import numpy as np

OUTLIER = 20.0  # times the median of the channels' largest |x|
NAMED = 10  # most outlier channels of one input that are listed


def range_facts(largest: np.ndarray) -> dict:
    """Summarise `largest` [channels], max |x| of every channel: {channels, median, p99, max, outliers, ...}.

    outliers: how many exceed OUTLIER times the median; the largest NAMED of them are listed by index (channel_ids) and
    by ratio to the median (ratios).
    """
    median = float(np.median(largest))
    ratios = largest / max(median, 1e-12)
    order = np.argsort(-ratios, kind="stable")
    count = int((ratios > OUTLIER).sum())
    named = order[: min(count, NAMED)]
    return {
        "channels": len(largest),
        "median": median,
        "p99": float(np.quantile(largest, 0.99)),
        "max": float(largest.max()),
        "outliers": count,
        "channel_ids": named.tolist(),
        "ratios": ratios[named].tolist(),
    }
