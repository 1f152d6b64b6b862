"""Intervals for scores whose unit is the image, not the answer. numpy and scipy only."""

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import binomtest


def wilson_interval(right: int, total: int, level: float = 0.95) -> tuple[float, float]:
    """Return Wilson's interval of a share (Wilson 1927), as fractions; ValueError if total is 0."""
    if total == 0:
        raise ValueError("An interval of 0 answers is undefined.")
    interval = binomtest(right, total).proportion_ci(confidence_level=level, method="wilson")
    return float(interval.low), float(interval.high)


def cluster_bootstrap_interval(
    values: Float[np.ndarray, "n"],
    clusters: Int[np.ndarray, "n"],
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the percentile interval of the mean when whole clusters (images) are resampled."""
    _, index = np.unique(clusters, return_inverse=True)
    sums = np.bincount(index, weights=values)
    counts = np.bincount(index)
    picks = np.random.default_rng(seed).integers(len(sums), size=(draws, len(sums)))
    means = sums[picks].sum(axis=1) / counts[picks].sum(axis=1)
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)
