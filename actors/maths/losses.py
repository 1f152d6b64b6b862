"""Losses of questions without sets of layers: the means that rank the sets, and their cluster-bootstrap intervals.

Axes: N questions, K sets of layers (or choices), B draws. Low losses are good; their unit is the criterion's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from actors.maths.columns import Number, number_names
from actors.maths.statistics import cluster_bootstrap_means, mark_differing_pairs, percentile_interval, rank_intervals


@dataclass(frozen=True)
class Losses:
    """Losses of N questions without K sets of layers; clusters_N numbers the questions' images."""

    values_NK: Float[np.ndarray, "n k"]
    weights_NK: Float[np.ndarray, "n k"]
    clusters_N: Int[np.ndarray, "n"]

    @property
    def means_K(self) -> Float[np.ndarray, "k"]:
        """Weighted mean of every column."""
        return (self.values_NK * self.weights_NK).sum(0) / self.weights_NK.sum(0)

    @property
    def ranked_K(self) -> Float[np.ndarray, "k"]:
        """The means to rank by: NaN becomes infinity, the largest."""
        return np.where(np.isnan(self.means_K), np.inf, self.means_K)

    @property
    def draws_BK(self) -> Float[np.ndarray, "b k"]:
        """Cluster-bootstrap draws of the means; all columns share the resampled images."""
        return cluster_bootstrap_means(self.values_NK, self.weights_NK, self.clusters_N)


@dataclass(frozen=True)
class Ranking:
    """K sets by loss, with 95 % intervals of the cluster bootstrap.

    order: places of the sets, least loss first. low_K, high_K: of the mean; first_K, last_K: of the rank (1: least).
    apart_KK: which pairs differ: the interval of their paired difference excludes 0.
    """

    order: list[int]
    low_K: Float[np.ndarray, "k"]
    high_K: Float[np.ndarray, "k"]
    first_K: Int[np.ndarray, "k"]
    last_K: Int[np.ndarray, "k"]
    apart_KK: Bool[np.ndarray, "k k"]


def tabulate_losses(
    values: Sequence[Sequence[Number]], weights: Sequence[Sequence[Number]], images: Sequence
) -> Losses:
    """Return the losses of N questions about `images` (their names), given as N rows of K numbers each."""
    return Losses(np.array(values, dtype=float), np.array(weights, float), number_names(images))


def rank_losses(losses: Losses, names: Sequence[int]) -> Ranking:
    """Rank K sets of layers by their mean losses, of which NaN is the largest.

    Of equal losses the smallest name comes first; the intervals of their ranks hold all ranks that they share.
    """
    draws_BK, lost_K = losses.draws_BK, losses.ranked_K
    low_K, high_K = percentile_interval(draws_BK)
    first_K, last_K = rank_intervals(draws_BK)
    order = sorted(range(len(names)), key=lambda k: (lost_K[k], names[k]))
    return Ranking(
        order, low_K, high_K, first_K.astype(int), np.ceil(last_K).astype(int), mark_differing_pairs(draws_BK)
    )


def count_apart(losses: Losses) -> tuple[int, int]:
    """Return how many pairs of sets differ at 95 % (paired by image), and how many pairs there are."""
    apart_KK = mark_differing_pairs(losses.draws_BK)
    count = len(apart_KK)
    return int(apart_KK.sum()) // 2, count * (count - 1) // 2


def compare_losses(losses: Losses) -> tuple[float, float, float]:
    """Return the paired difference of the mean losses, second set - first, and its interval."""
    means_K, draws_BK = losses.means_K, losses.draws_BK
    low, high = (float(bound[0]) for bound in percentile_interval(draws_BK[:, 1:] - draws_BK[:, :1]))
    return float(means_K[1] - means_K[0]), low, high
