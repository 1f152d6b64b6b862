"""Rank correlations of two columns. scipy only."""

from collections.abc import Sequence
from math import isnan

from scipy.stats import kendalltau, spearmanr

from actors.maths.columns import Number


def compute_kendall_tau(first: Sequence[Number], second: Sequence[Number]) -> float | None:
    """Return Kendall's tau-b of two columns (Kendall 1945), from -1 to 1; None where one of them does not vary.

    (agreeing - disagreeing pairs) / sqrt(pairs untied in one * pairs untied in other).
    """
    tau = float(kendalltau(first, second).statistic)
    return None if isnan(tau) else tau


def compute_spearman_rho(first: Sequence[Number], second: Sequence[Number]) -> float | None:
    """Return Spearman's rho, the correlation of the ranks (Spearman 1904), from -1 to 1.

    None where one of the columns does not vary, and of fewer than three pairs.
    """
    if len(first) < 3 or len(set(first)) < 2 or len(set(second)) < 2:
        return None
    return float(spearmanr(first, second).statistic)
