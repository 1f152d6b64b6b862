"""Paired comparison of two models' answers to the same questions, with the image as the unit. numpy and scipy only."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats

from actors.maths.statistics import bound_draws, cluster_bootstrap_interval, cluster_bootstrap_means

MAX_EXACT = 20  # images up to which all sign flips are counted


@dataclass(frozen=True)
class PairedDifference:
    """The mean of scores - others over the same answers, its interval, p value (of this comparison alone) and power.

    detectable: the mean difference that is found with 80 % power; None where nothing differs, and with one image.
    """

    mean: float
    low: float
    high: float
    p: float
    detectable: float | None
    identical: bool


def compare_pairs(
    scores_N: Float[np.ndarray, "n"], others_N: Float[np.ndarray, "n"], clusters_N: Int[np.ndarray, "n"]
) -> PairedDifference:
    """Compare two models' scores of the same questions, with the image as the unit; all but p in the scores' unit."""
    differences_N = scores_N - others_N
    identical, several = not differences_N.any(), clusters_N.max() > clusters_N.min()
    return PairedDifference(
        float(differences_N.mean()),
        *paired_interval(scores_N, others_N, clusters_N),
        sign_flip_p(differences_N, clusters_N),
        detectable_difference(differences_N, clusters_N) if several and not identical else None,
        identical,
    )


def bootstrap_difference(
    scores_N: Float[np.ndarray, "n"], others_N: Float[np.ndarray, "n"], clusters_N: Int[np.ndarray, "n"]
) -> tuple[float, float, float]:
    """Return the mean of scores - others, same answers in both, and its interval (`paired_interval`)."""
    return float((scores_N - others_N).mean()), *paired_interval(scores_N, others_N, clusters_N)


def compute_ratio(
    value: float, original: float, draws_B: Float[np.ndarray, "b"], others_B: Float[np.ndarray, "b"]
) -> tuple[float | None, tuple[float, float] | None]:
    """Return value / original, None where that is 0, and the ratio's interval (`ratio_interval`)."""
    return float(value / original) if original else None, ratio_interval(draws_B, others_B)


def bootstrap_ratio(
    scores_N: Float[np.ndarray, "n"], originals_N: Float[np.ndarray, "n"], clusters_N: Int[np.ndarray, "n"]
) -> tuple[float | None, tuple[float, float] | None]:
    """Return the ratio of two models' mean scores of the same answers, and its interval, as `compute_ratio` does.

    Both models have the same draws of whole images.
    """
    values_NK = np.array([scores_N, originals_N], dtype=float).T
    draws_KB = cluster_bootstrap_means(values_NK, np.ones_like(values_NK), clusters_N).T
    mean, original = values_NK.mean(axis=0).tolist()
    return compute_ratio(mean, original, draws_KB[0], draws_KB[1])


def paired_interval(
    scores_N: Float[np.ndarray, "n"],
    others_N: Float[np.ndarray, "n"],
    clusters_N: Int[np.ndarray, "n"],
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the interval of the mean of scores - others, same answers in both, when whole images are resampled."""
    return cluster_bootstrap_interval(scores_N - others_N, clusters_N, level, draws, seed)


def ratio_interval(
    draws_B: Float[np.ndarray, "b"], others_B: Float[np.ndarray, "b"], level: float = 0.95
) -> tuple[float, float] | None:
    """Return the interval of the ratio draws / others, paired draw by draw; None if the denominator is 0 in a draw."""
    if (others_B == 0).any():
        return None
    return bound_draws(draws_B / others_B, level)


def sign_flip_p(
    differences_N: Float[np.ndarray, "n"], clusters_N: Int[np.ndarray, "n"], draws: int = 20_000, seed: int = 0
) -> float:
    """Return the two-sided p value of a mean difference of 0, by flipping the signs of whole images (Fisher 1935).

    Exact for at most 20 images with a difference; above that (1 + number as extreme) / (1 + draws) of sampled flips
    (Phipson and Smyth 2010).
    """
    sums_C = _cluster_sums(differences_N, clusters_N)[0]
    sums_C = sums_C[sums_C != 0]  # flipping a 0 changes nothing
    extreme = abs(sums_C.sum()) - 1e-9 * np.abs(sums_C).sum()  # ties count, whatever their rounding
    if len(sums_C) <= MAX_EXACT:
        flipped = np.zeros(1)
        for value in sums_C:
            flipped = np.concatenate([flipped + value, flipped - value])
        return float(np.mean(np.abs(flipped) >= extreme))
    rng = np.random.default_rng(seed)
    flipped = (2.0 * rng.integers(2, size=(draws, len(sums_C))) - 1.0) @ sums_C
    return float((1 + np.sum(np.abs(flipped) >= extreme)) / (1 + draws))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values adjusted for their number, in the same order (Holm 1979); controls the family-wise error rate.

    Sorted, the k-th smallest of m becomes the running maximum of (m - k + 1) p_k, at most 1.
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for k, place in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - k) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def mcnemar_p(right_N: Bool[np.ndarray, "n"], others_N: Bool[np.ndarray, "n"]) -> float:
    """Return the exact two-sided p value of equal shares of right answers in pairs (McNemar 1947).

    Of the pairs that differ, half should favour either side (binomial test); 1 if none differs.
    """
    only, other = int(np.sum(right_N & ~others_N)), int(np.sum(others_N & ~right_N))
    return float(stats.binomtest(only, only + other).pvalue) if only + other else 1.0


def detectable_difference(
    differences_N: Float[np.ndarray, "n"], clusters_N: Int[np.ndarray, "n"], power: float = 0.8, level: float = 0.95
) -> float:
    """Return the mean difference that a two-sided paired test over C images finds with `power`, in the scores' unit.

    (t_{(1 + level) / 2} + t_power) SE with C - 1 degrees of freedom (Bloom 1995), where
    SE^2 = C / (C - 1) sum_c (sum of image c - its number of answers * mean)^2 / N^2. ValueError: fewer than 2 images.
    """
    sums_C, counts_C = _cluster_sums(differences_N, clusters_N)
    count = len(sums_C)
    if count < 2:
        raise ValueError(f"The spread between images is undefined with {count} image.")
    residuals_C = sums_C - counts_C * differences_N.mean()
    error = np.sqrt(count / (count - 1) * np.sum(residuals_C**2)) / len(differences_N)
    return float((stats.t.ppf((1 + level) / 2, count - 1) + stats.t.ppf(power, count - 1)) * error)


def finding(low: float, high: float, p: float, level: float = 0.95) -> Literal["better", "worse", "unresolved"]:
    """Return the verdict of a difference's interval and adjusted p value: "unresolved" unless both exclude 0."""
    if low <= 0 <= high or p > 1 - level:
        return "unresolved"
    return "better" if low > 0 else "worse"


def _cluster_sums(
    values_N: Float[np.ndarray, "n"], clusters_N: Int[np.ndarray, "n"]
) -> tuple[Float[np.ndarray, "c"], Int[np.ndarray, "c"]]:
    """Return sum and number of the values of every cluster."""
    index_N = np.unique(clusters_N, return_inverse=True)[1]
    return np.bincount(index_N, weights=values_N), np.bincount(index_N)
