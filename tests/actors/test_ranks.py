"""Kendall's tau and Spearman's rho, by hand."""

import pytest

from actors.maths.ranks import compute_kendall_tau, compute_spearman_rho


def test_kendalls_tau():
    """Of three pairs the second column orders one differently: (2 - 1) / 3."""
    assert compute_kendall_tau([1, 2, 3], [1, 3, 2]) == compute_kendall_tau([1, 3, 2], [1, 2, 3])
    assert compute_kendall_tau([1, 2, 3], [1, 3, 2]) == pytest.approx(1 / 3)
    assert compute_kendall_tau([1, 2, 3], [1, 2, 3]) == pytest.approx(1)
    assert compute_kendall_tau([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)


def test_kendalls_tau_with_ties():
    """tau-b of 1, 2, 3 and 0, 0, 5: two pairs agree, one is tied: 2 / sqrt(3 * 2). All tied: undefined."""
    assert compute_kendall_tau([1.0, 2.0, 3.0], [0.0, 0.0, 5.0]) == pytest.approx(2 / 6**0.5)
    assert compute_kendall_tau([1.0, 2.0, 3.0], [0.0] * 3) is None


def test_spearmans_rho():
    """Ranks 1 2 3 and 1 3 2: 1 - 6 (0 + 1 + 1) / (3 (9 - 1)) = 0.5, however far apart the numbers are."""
    assert compute_spearman_rho((1, 2, 3), (-5, 100, 7)) == pytest.approx(0.5)
    assert compute_spearman_rho((1, 2), (1, 2)) is None
    assert compute_spearman_rho((1, 2, 3), (4, 4, 4)) is compute_spearman_rho((4, 4, 4), (1, 2, 3)) is None
