"""How far two orders of the same things agree. scipy only."""

from collections.abc import Sequence
from math import isnan

from scipy.stats import kendalltau, spearmanr

from actors.maths.columns import Number


def compute_kendall_tau(one: Sequence[Number], other: Sequence[Number]) -> float | None:
    """Return Kendall's tau-b of two columns (Kendall 1945), from -1 to 1; None where one of them does not vary.

    (agreeing - disagreeing pairs) / sqrt(pairs untied in one * pairs untied in other).
    """
    tau = float(kendalltau(one, other).statistic)
    return None if isnan(tau) else tau


def compute_spearman_rho(one: Sequence[Number], other: Sequence[Number]) -> float | None:
    """Return Spearman's rho, the correlation of the ranks (Spearman 1904), from -1 to 1.

    None where one of the columns does not vary, and of fewer than three pairs.
    """
    if len(one) < 3 or len(set(one)) < 2 or len(set(other)) < 2:
        return None
    return float(spearmanr(one, other).statistic)
