"""Agreement of two raters on a scale of labels, with intervals over images. numpy only."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from actors.maths.statistics import bootstrap_mean, cluster_draws


def mean_kappa(
    first_N: Float[np.ndarray, "n"],
    second_N: Float[np.ndarray, "n"],
    pairs_N: Int[np.ndarray, "n"],
    clusters_N: Int[np.ndarray, "n"],
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Return the quadratically weighted kappa (Cohen 1968) and its cluster-bootstrap interval (clusters: images).

    Entry n is an answer that both raters of the pair `pairs_N[n]` labelled. With several pairs: the mean of their
    kappas (Light 1971), weighted by their numbers of answers. kappa = 1 - sum_i (x_i - y_i)^2 / E, where E is the
    expectation of the sum if the x are paired with the y at random. NaN: undefined, because all labels are equal.
    """
    index_N, pair_N = (np.unique(names, return_inverse=True)[1] for names in (clusters_N, pairs_N))
    count, pairs = int(index_N.max()) + 1, int(pair_N.max()) + 1
    powers_NM = np.stack([np.ones_like(first_N), first_N, second_N, first_N**2, second_N**2, first_N * second_N], 1)
    sums_CPM = np.zeros((count, pairs, 6))
    np.add.at(sums_CPM, (index_N, pair_N), powers_NM)
    kappas_B = _kappa(np.tensordot(cluster_draws(count, draws, seed), sums_CPM, 1))
    value = float(_kappa(sums_CPM.sum(0)))
    if np.isnan(kappas_B).all():
        return value, np.nan, np.nan
    low, high = np.nanquantile(kappas_B, [(1 - level) / 2, (1 + level) / 2])
    return value, float(low), float(high)


def measure_signed_error(
    labels: Sequence[int], ratings: Sequence[Sequence[int]], clusters_N: Int[np.ndarray, "n"]
) -> tuple[float, float, float]:
    """Return the mean of (label - mean rating) over answers and its cluster-bootstrap interval, in labels.

    labels and ratings: a label and at least one rating for each of N answers.
    """
    errors_N = np.array([label - np.mean(marks) for label, marks in zip(labels, ratings, strict=True)])
    return bootstrap_mean(errors_N, clusters_N)


def _kappa(sums_PM: Float[np.ndarray, "*b p 6"]) -> Float[np.ndarray, "*b"]:
    """Return the mean kappa of the pairs from their sums of 1, x, y, x^2, y^2, xy."""
    n, x, y, xx, yy, xy = np.moveaxis(sums_PM, -1, 0)
    expected = n * (xx + yy) - 2 * x * y  # n times E
    defined = expected > 1e-9
    kappa = 1 - n * (xx + yy - 2 * xy) / np.where(defined, expected, 1.0)
    weight = np.where(defined, n, 0.0)
    total = weight.sum(-1)
    return np.where(total > 0, (kappa * weight).sum(-1) / np.where(total > 0, total, 1.0), np.nan)
