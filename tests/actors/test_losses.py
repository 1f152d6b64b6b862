"""Losses without sets of layers: their means, ranks and paired differences."""

import itertools

import numpy as np
import pytest

from actors.maths.losses import Losses, compare_losses, count_apart, rank_losses, tabulate_losses


def losses(values) -> Losses:
    values = np.array(values, dtype=float)
    return Losses(values, np.ones_like(values), np.arange(len(values)))


def three() -> Losses:
    """40 questions: 0.2 always, nothing always, and 0.21 on average, at random."""
    noise = np.random.default_rng(0).normal(0, 0.5, 40)
    return losses(np.stack([np.full(40, 0.2), np.zeros(40), 0.21 + noise - noise.mean()], axis=1))


def test_means_are_weighted():
    """Answers of 1 and 3 tokens that lose 4 and 0 nats a token: (4 + 0) / 4; images are numbered in their order."""
    found = tabulate_losses([[4, 1], [0, 1]], [[1, 1], [3, 1]], ["b.png", "a.png"])
    assert found.means_K.tolist() == [1, 1]
    assert found.clusters_N.tolist() == [1, 0]


def test_what_is_no_number_is_the_largest():
    found = losses([[np.nan, 2.0, -1.0]] * 3)
    assert np.isnan(found.means_K[0]) and found.ranked_K.tolist() == [np.inf, 2, -1]
    assert rank_losses(found, [0, 1, 2]).order == [2, 1, 0]


def test_ranks_by_hand():
    """The first and the third cannot be told apart: either may be second or third."""
    found = rank_losses(three(), [2, 5, 7])
    assert found.order == [1, 0, 2]
    assert list(zip(found.first_K.tolist(), found.last_K.tolist(), strict=True)) == [(2, 3), (1, 1), (2, 3)]
    assert (found.low_K[0], found.high_K[0]) == pytest.approx((0.2, 0.2)) and found.low_K[2] < 0.21 < found.high_K[2]
    assert found.apart_KK.tolist() == [[False, True, False], [True, False, True], [False, True, False]]


def test_equals_go_by_name_and_share_their_ranks():
    found = rank_losses(losses(np.tile([0.0, 0.3, 0.0], (6, 1))), [9, 4, 1])
    assert found.order == [2, 0, 1]
    assert (found.first_K.tolist(), found.last_K.tolist()) == ([1, 3, 1], [2, 3, 2])


def test_pairs_apart_are_those_of_the_ranking():
    assert count_apart(three()) == (2, 3)
    found = losses(np.random.default_rng(1).normal(size=(30, 5)) + np.arange(5) / 3)
    table = rank_losses(found, range(5)).apart_KK
    assert count_apart(found) == (sum(table[pair] for pair in itertools.combinations(range(5), 2)), 10)


def test_a_paired_difference_of_losses():
    """The second loses 0.5 more on every question of very different ones: there is no spread."""
    first = np.random.default_rng(2).normal(size=20)
    assert compare_losses(losses(np.stack([first, first + 0.5], 1))) == pytest.approx((0.5, 0.5, 0.5))
    gain, low, high = compare_losses(losses(np.random.default_rng(3).normal(size=(20, 2))))
    assert low < gain < high
