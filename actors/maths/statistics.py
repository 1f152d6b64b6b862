"""Intervals of scores, with the image as the unit instead of the answer. numpy and scipy only."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import binomtest, norm, rankdata

from actors.maths.columns import Number

# Modified z-score above which a value is an outlier, and the factors that scale it (Iglewicz and Hoaglin 1993).
OUTLIER_Z, MAD_SCALE, MEAN_SCALE = 3.5, 1.4826, 1.2533


def wilson_interval(right: int, total: int, level: float = 0.95) -> tuple[float, float]:
    """Return Wilson's interval of a share (Wilson 1927), as fractions; ValueError if total is 0."""
    if total == 0:
        raise ValueError("An interval of 0 answers is undefined.")
    interval = binomtest(right, total).proportion_ci(confidence_level=level, method="wilson")
    return float(interval.low), float(interval.high)


def cluster_share_interval(
    hits_N: Bool[np.ndarray, "n"], clusters_N: Int[np.ndarray, "n"], level: float = 0.95
) -> tuple[float, float]:
    """Return Wilson's interval of a share with the effective number of answers (Korn and Graubard 1998), as fractions.

    That number is p (1 - p) / SE^2, where SE^2 = sum_c (hits of image c - its number of answers * p)^2 / N^2, at most
    N; where all answers are alike, the number of images. (There a bootstrap interval would have no width.)
    """
    _, index_N = np.unique(clusters_N, return_inverse=True)
    counts_C, share = np.bincount(index_N), float(hits_N.mean())
    residuals_C = np.bincount(index_N, weights=hits_N.astype(float)) - counts_C * share
    spread = float(np.sum(residuals_C**2)) / len(hits_N) ** 2
    alike = share in (0.0, 1.0)
    size = len(counts_C) if alike else min(len(hits_N), share * (1 - share) / spread) if spread else len(hits_N)
    z = float(norm.ppf((1 + level) / 2))
    centre = (share + z**2 / (2 * size)) / (1 + z**2 / size)
    half = z / (1 + z**2 / size) * np.sqrt(share * (1 - share) / size + z**2 / (4 * size**2))
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def cluster_draws(count: int, draws: int = 2000, seed: int = 0) -> Float[np.ndarray, "draws count"]:
    """Return how often each of `count` clusters is picked in each bootstrap draw."""
    picks = np.random.default_rng(seed).integers(count, size=(draws, count))
    places = picks + count * np.arange(draws)[:, None]
    return np.bincount(places.ravel(), minlength=draws * count).reshape(draws, count).astype(float)


def cluster_bootstrap_means(
    values_NK: Float[np.ndarray, "n k"],
    weights_NK: Float[np.ndarray, "n k"],
    clusters_N: Int[np.ndarray, "n"],
    draws: int = 2000,
    seed: int = 0,
) -> Float[np.ndarray, "draws k"]:
    """Return cluster-bootstrap draws of K columns' weighted means; all share the resampled clusters (images)."""
    _, index = np.unique(clusters_N, return_inverse=True)
    count = int(index.max()) + 1
    sums, totals = np.zeros((count, values_NK.shape[1])), np.zeros((count, values_NK.shape[1]))
    np.add.at(sums, index, values_NK * weights_NK)
    np.add.at(totals, index, weights_NK)
    counts_BC = cluster_draws(count, draws, seed)
    return (counts_BC @ sums) / (counts_BC @ totals)


def percentile_interval(
    draws_BK: Float[np.ndarray, "b k"], level: float = 0.95
) -> tuple[Float[np.ndarray, "k"], Float[np.ndarray, "k"]]:
    """Return the percentile interval of every column."""
    tail = (1 - level) / 2
    low, high = np.quantile(draws_BK, [tail, 1 - tail], axis=0)
    return low, high


def cluster_bootstrap_interval(
    values: Float[np.ndarray, "n"],
    clusters: Int[np.ndarray, "n"],
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the percentile interval of the mean by the cluster bootstrap (clusters: images)."""
    column = values.astype(float)[:, None]
    low, high = percentile_interval(cluster_bootstrap_means(column, np.ones_like(column), clusters, draws, seed), level)
    return float(low[0]), float(high[0])


def average(values: Sequence[Number]) -> float:
    """Return the mean of at least one number, in its unit."""
    return float(np.mean(values))


def bootstrap_mean(
    values_N: Float[np.ndarray, "n"],
    clusters_N: Int[np.ndarray, "n"],
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Return the mean and its cluster-bootstrap interval (clusters: images), in the values' unit."""
    return float(values_N.mean()), *cluster_bootstrap_interval(values_N, clusters_N, level, draws, seed)


def bound_draws(draws_B: Float[np.ndarray, "b"], level: float = 0.95) -> tuple[float, float]:
    """Return the percentile interval of one number's draws."""
    low, high = percentile_interval(draws_B[:, None], level)
    return float(low[0]), float(high[0])


def rank_intervals(
    draws_BK: Float[np.ndarray, "b k"], level: float = 0.95
) -> tuple[Float[np.ndarray, "k"], Float[np.ndarray, "k"]]:
    """Return the percentile interval of every column's rank: 1 for the smallest; NaN is the largest.

    Of equal columns the low end counts the first of the ranks that they share, the high end the last.
    """
    filled_BK = np.where(np.isnan(draws_BK), np.inf, draws_BK)
    first_BK, last_BK = (rankdata(filled_BK, method=ties, axis=1).astype(float) for ties in ("min", "max"))
    return percentile_interval(first_BK, level)[0], percentile_interval(last_BK, level)[1]


def mark_differing_pairs(draws_BK: Float[np.ndarray, "b k"], level: float = 0.95) -> Bool[np.ndarray, "k k"]:
    """Tell which pairs of columns differ: the interval of their paired difference excludes 0."""
    columns = draws_BK.shape[1]
    differs = np.zeros((columns, columns), dtype=bool)
    for k in range(columns):
        low, high = percentile_interval(draws_BK - draws_BK[:, k : k + 1], level)
        differs[k] = (low > 0) | (high < 0)
    return differs


def loss_outliers(losses_L: Float[np.ndarray, "l"]) -> Bool[np.ndarray, "l"]:
    """Tell which layers' single removal costs far more than the others' (one-sided modified z-score above 3.5).

    losses_L: mean negative log-likelihood without layer l (nats per token), i.e. the logarithm of the perplexity.
    The z-score is (x - median) / (1.4826 MAD); where more than half of the values are equal, the mean absolute
    deviation stands in for the median one. A loss that is not finite is an outlier.
    """
    finite = losses_L[np.isfinite(losses_L)]
    away = losses_L - np.median(finite)
    spread = MAD_SCALE * np.median(np.abs(finite - np.median(finite)))
    if spread == 0:
        spread = MEAN_SCALE * np.mean(np.abs(finite - np.median(finite)))
    return ~np.isfinite(losses_L) | ((away > OUTLIER_Z * spread) & (away > 0))
