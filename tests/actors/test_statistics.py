"""Intervals, against Wilson's formula written out and a naive resampling of clusters."""

import math

import numpy as np
import pytest

from actors.maths.statistics import (
    average,
    bootstrap_mean,
    bound_draws,
    cluster_bootstrap_interval,
    cluster_share_interval,
    wilson_interval,
)


@pytest.mark.parametrize(("right", "total"), [(0, 10), (10, 10), (7, 20), (94, 117)])
def test_wilson_formula(right, total):
    """(p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n) with z = 1.959964."""
    z, p = 1.959963984540054, right / total
    middle = p + z**2 / (2 * total)
    spread = z * math.sqrt(p * (1 - p) / total + z**2 / (4 * total**2))
    below, above = (middle - spread) / (1 + z**2 / total), (middle + spread) / (1 + z**2 / total)
    assert wilson_interval(right, total) == pytest.approx((max(below, 0), above), abs=1e-9)


def test_wilson_by_hand():
    """0 of 10: the upper end is z^2 / (n + z^2) = 3.8415 / 13.8415 = 0.2775."""
    low, high = wilson_interval(0, 10)
    assert low == pytest.approx(0, abs=1e-12) and high == pytest.approx(0.2775, abs=1e-4)


def test_wilson_of_nothing():
    """0 of 0 has no interval."""
    with pytest.raises(ValueError, match="0 answers"):
        wilson_interval(0, 0)


def naive_bootstrap(values, clusters, draws: int, seed: int) -> tuple[float, float]:
    """Resample whole clusters, concatenate their values, take the mean; the 2.5 and 97.5 percentiles."""
    rng = np.random.default_rng(seed)
    names = sorted(set(clusters))
    means = []
    for _ in range(draws):
        chosen = [names[i] for i in rng.integers(len(names), size=len(names))]
        means.append(np.mean([v for name in chosen for v, c in zip(values, clusters, strict=True) if c == name]))
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def test_bootstrap_against_a_naive_one():
    """Clusters of unequal size: the same percentiles up to the noise of 4,000 draws."""
    rng = np.random.default_rng(1)
    clusters = np.repeat(np.arange(12), [1, 2, 3] * 4)
    values = rng.normal(size=12)[clusters] + 0.1 * rng.normal(size=24)
    low, high = cluster_bootstrap_interval(values, clusters, draws=4000, seed=2)
    expected = naive_bootstrap(values, clusters, 4000, 3)
    assert (low, high) == pytest.approx(expected, abs=0.05)
    assert low < values.mean() < high


def test_bootstrap_respects_clusters():
    """20 images x 50 equal answers hold 20 facts; taken as 1,000 answers the interval is 7 times narrower."""
    facts = np.tile([0.0, 1.0], 10)
    values, clusters = np.repeat(facts, 50), np.repeat(np.arange(20), 50)
    low, high = cluster_bootstrap_interval(values, clusters)
    # a mean of 20 coins: standard error sqrt(0.25 / 20) = 0.112, interval about 0.44 wide
    assert high - low == pytest.approx(2 * 1.96 * 0.1118, rel=0.15)
    alone = cluster_bootstrap_interval(values, np.arange(1000))
    assert alone[1] - alone[0] == pytest.approx((high - low) / math.sqrt(50), rel=0.15)


def test_bootstrap_is_repeatable():
    """The same seed gives the same interval; names of clusters do not matter; one cluster has no spread."""
    values, clusters = np.arange(6.0), np.array([0, 0, 1, 1, 2, 2])
    first = cluster_bootstrap_interval(values, clusters, seed=5)
    assert first == cluster_bootstrap_interval(values, clusters, seed=5)
    assert first == cluster_bootstrap_interval(values, clusters * 10 + 7, seed=5)
    assert cluster_bootstrap_interval(values, np.zeros(6, dtype=int)) == (2.5, 2.5)


def test_higher_level_is_wider():
    """99 % contains 80 %."""
    values, clusters = np.random.default_rng(0).normal(size=40), np.arange(40) // 2
    wide = cluster_bootstrap_interval(values, clusters, level=0.99)
    narrow = cluster_bootstrap_interval(values, clusters, level=0.8)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


@pytest.mark.parametrize(("right", "total"), [(0, 10), (10, 10), (7, 20), (94, 117)])
def test_a_share_of_single_answers_has_wilsons_interval(right, total):
    hits = np.arange(total) < right
    assert cluster_share_interval(hits, np.arange(total)) == pytest.approx(wilson_interval(right, total), abs=1e-9)


@pytest.mark.parametrize("right", [0, 3, 10])
def test_answers_that_always_agree_within_an_image_count_once(right):
    """Each of 10 images answered three times, always alike: Wilson's interval of 10 answers, not of 30."""
    images = np.repeat(np.arange(10), 3)
    assert cluster_share_interval(images < right, images) == pytest.approx(wilson_interval(right, 10), abs=1e-9)


def test_a_shares_effective_number_by_hand():
    """Images with 2 of 2, 1 of 2 and 0 of 2: p = 1/2, SE^2 = (1 + 0 + 1) / 36, so 1/4 / (1/18) = 4.5 answers."""
    low, high = cluster_share_interval(np.array([1, 1, 1, 0, 0, 0], dtype=bool), np.array([0, 0, 1, 1, 2, 2]))
    z = 1.959963984540054
    half = z / (1 + z**2 / 4.5) * math.sqrt(0.25 / 4.5 + z**2 / (4 * 4.5**2))
    assert (low, high) == pytest.approx((0.5 - half, 0.5 + half))


def test_a_share_where_every_image_is_half_right():
    """No spread between images: the interval is that of all answers, not of none."""
    hits, images = np.array([True, False] * 10), np.repeat(np.arange(10), 2)
    assert cluster_share_interval(hits, images) == pytest.approx(wilson_interval(10, 20), abs=1e-9)


def test_a_mean_and_its_interval():
    """0 and 1 of two images: one draw in four has both the same, so the interval is all there is."""
    assert bootstrap_mean(np.array([0.0, 1.0]), np.arange(2)) == (0.5, 0.0, 1.0)
    values, clusters = np.random.default_rng(0).normal(size=40), np.arange(40) // 2
    assert bootstrap_mean(values, clusters)[1:] == cluster_bootstrap_interval(values, clusters)
    assert average([1, 2, 6]) == 3


def test_the_interval_of_one_numbers_draws():
    """Of 0 to 100: 2.5 % lie below 2.5, 2.5 % above 97.5."""
    assert bound_draws(np.arange(101.0)) == pytest.approx((2.5, 97.5))
