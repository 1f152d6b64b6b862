"""Paired comparisons: hand-computed, against scipy, and against simulated truths."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from actors.maths.paired import (
    bootstrap_difference,
    bootstrap_ratio,
    compare_pairs,
    compute_ratio,
    detectable_difference,
    finding,
    holm,
    mcnemar_p,
    paired_interval,
    ratio_interval,
    sign_flip_p,
)
from actors.maths.statistics import cluster_bootstrap_interval

IMAGES, ANSWERS = 39, 3
CLUSTERS = np.repeat(np.arange(IMAGES), ANSWERS)


def simulated(rng: np.random.Generator, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Labels 0-4 of two models on 39 images x 3 questions: what a model sees in an image marks all its answers."""

    def labels(mean: float) -> np.ndarray:
        image = rng.normal(mean, 1.0, IMAGES)[CLUSTERS]
        return np.clip(np.round(image + rng.normal(0, 0.7, len(CLUSTERS))), 0, 4)

    return labels(2.0 + shift), labels(2.0)


def test_cluster_interval_covers_and_the_naive_one_does_not():
    """True difference 0 by symmetry: 95 % intervals over images cover it in 92-98 % of 600 runs, over answers in
    fewer than 88 %."""
    rng = np.random.default_rng(11)
    covered = np.zeros(2)
    for run in range(600):
        first, second = simulated(rng)
        for column, clusters in enumerate((CLUSTERS, np.arange(len(CLUSTERS)))):
            low, high = paired_interval(first, second, clusters, draws=400, seed=run)
            covered[column] += low <= 0 <= high
    by_image, by_answer = covered / 600
    assert 0.92 <= by_image <= 0.98
    assert by_answer < 0.88


def test_one_models_interval_covers_over_images_and_not_over_answers():
    """True mean 2 by symmetry: one model's 95 % interval covers it in 91-98 % of 400 runs over images,
    in fewer than 85 % over answers."""
    rng = np.random.default_rng(13)
    covered = np.zeros(2)
    for run in range(400):
        labels, _ = simulated(rng)
        for column, clusters in enumerate((CLUSTERS, np.arange(len(CLUSTERS)))):
            low, high = cluster_bootstrap_interval(labels, clusters, draws=400, seed=run)
            covered[column] += low <= 2 <= high
    by_image, by_answer = covered / 400
    assert 0.91 <= by_image <= 0.98
    assert by_answer < 0.85


def test_sign_flip_keeps_its_level():
    """True difference 0: p <= 0.05 in 5 % +- 3 % of 400 runs over images, in more than 12 % over answers."""
    rng = np.random.default_rng(12)
    found = np.zeros(2)
    for run in range(400):
        first, second = simulated(rng)
        for column, clusters in enumerate((CLUSTERS, np.arange(len(CLUSTERS)))):
            found[column] += sign_flip_p(first - second, clusters, draws=500, seed=run) <= 0.05
    by_image, by_answer = found / 400
    assert 0.02 <= by_image <= 0.08
    assert by_answer > 0.12


def test_paired_interval_by_hand():
    """A constant difference has no spread, whatever the answers are; the sign is that of first - second."""
    second = np.random.default_rng(0).normal(size=len(CLUSTERS))
    assert paired_interval(second + 0.5, second, CLUSTERS) == pytest.approx((0.5, 0.5))


def test_sign_flip_by_hand():
    """Sums 1, 2, 3 of three images: of 8 flips, +++ and --- reach 6. With a -1: sums -1, 2, 3 = 4 is reached by 4."""
    differences, clusters = np.array([0.5, 0.5, 2.0, 3.0]), np.array([0, 0, 1, 2])
    assert sign_flip_p(differences, clusters) == 2 / 8
    assert sign_flip_p(differences * [-1, -1, 1, 1], clusters) == 4 / 8
    assert sign_flip_p(np.zeros(4), clusters) == 1.0


def test_sign_flip_against_scipy():
    """Ten images, all 1,024 flips; with a twin of it whose ties are spoilt by rounding; zeros change nothing."""
    differences = np.random.default_rng(3).normal(0.4, 1, 10)
    expected = stats.permutation_test(
        (differences,), np.sum, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
    )
    assert sign_flip_p(differences, np.arange(10)) == pytest.approx(expected.pvalue, abs=1e-12)
    padded = np.concatenate([differences, np.zeros(30)])
    assert sign_flip_p(padded, np.arange(40)) == pytest.approx(expected.pvalue, abs=1e-12)
    tenths = np.array([0.1, 0.2, 0.3, -0.1, 0.2])
    tied = np.mean(
        [abs(sum(signs * np.array([1, 2, 3, -1, 2]))) >= 7 for signs in itertools.product([1, -1], repeat=5)]
    )
    assert sign_flip_p(tenths, np.arange(5)) == tied


def test_sampled_flips_agree_with_exact_ones():
    """18 images, p exact; three more whose differences hardly matter make it sampled: the same within its noise."""
    rng = np.random.default_rng(4)
    differences = np.concatenate([rng.normal(0.4, 1, 18), np.full(3, 1e-12)])
    exact = sign_flip_p(differences[:18], np.arange(18))
    sampled = sign_flip_p(differences, np.arange(21), draws=20_000, seed=1)
    assert sampled != exact and sampled == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 20_000))
    assert sampled == sign_flip_p(differences, np.arange(21), draws=20_000, seed=1)
    assert sign_flip_p(np.ones(39), np.arange(39), draws=999) == 1 / 1000  # never 0


def test_holm_by_hand():
    """0.01, 0.04, 0.03 of three: 3 x 0.01, then 2 x 0.03, then max(0.06, 0.04); never above 1."""
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02] and holm([]) == []


def test_mcnemar_by_hand():
    """One against five of six: 2 (1 + 6) / 64 = 0.21875; pairs that agree do not matter; none differs: 1."""
    first = np.array([True, False, False, False, False, False])
    assert mcnemar_p(first, ~first) == pytest.approx(14 / 64)
    agreeing = np.ones(50, dtype=bool)
    assert mcnemar_p(np.append(first, agreeing), np.append(~first, agreeing)) == pytest.approx(14 / 64)
    assert mcnemar_p(agreeing, agreeing) == 1.0


def test_detectable_difference_by_hand():
    """Five images, one answer each, differences -2..2: SE = sqrt(2.5 / 5); t(0.975; 4) + t(0.8; 4) = 2.776 + 0.941."""
    expected = (2.77645 + 0.94096) * math.sqrt(0.5)
    assert detectable_difference(np.arange(-2.0, 3.0), np.arange(5)) == pytest.approx(expected, rel=1e-4)
    repeated = np.repeat(np.arange(-2.0, 3.0), 3)  # three equal answers per image hold nothing new
    assert detectable_difference(repeated, np.repeat(np.arange(5), 3)) == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match="1 image"):
        detectable_difference(np.ones(3), np.zeros(3, dtype=int))


def test_detectable_difference_is_found_four_times_of_five():
    """Shifted by the difference that it names, the paired t test over 39 images has a power of 80 % +- 3 %."""
    rng = np.random.default_rng(5)

    def noise() -> np.ndarray:
        return rng.normal(0, 1, IMAGES)[CLUSTERS] + rng.normal(0, 0.7, len(CLUSTERS))

    named = np.mean([detectable_difference(noise(), CLUSTERS) for _ in range(500)])
    means = np.array([noise().reshape(IMAGES, ANSWERS).mean(axis=1) + named for _ in range(3000)])
    assert np.mean(stats.ttest_1samp(means, 0, axis=1).pvalue < 0.05) == pytest.approx(0.8, abs=0.03)


def test_finding():
    """Better or worse only if interval and p value agree."""
    assert finding(0.1, 0.5, 0.01) == "better"
    assert finding(-0.5, -0.1, 0.01) == "worse"
    assert finding(-0.1, 0.5, 0.01) == finding(0.0, 0.5, 0.01) == finding(0.1, 0.5, 0.06) == "unresolved"


def test_a_ratio_of_the_same_draws():
    """Always nine tenths of the other: no width, however wide the draws; and none where the other can be 0."""
    draws = np.random.default_rng(0).uniform(0.2, 1, 500)
    assert ratio_interval(0.9 * draws, draws) == pytest.approx((0.9, 0.9))
    assert ratio_interval(draws, np.ones(500)) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])))
    assert ratio_interval(draws, np.append(draws[1:], 0)) is None


def test_two_models_are_compared():
    """2, 3 and -1 more on three images: a mean of 4/3, of 8 flips 4 are as extreme; the same twice is identical."""
    others = np.array([0.0, 5.0, 1.0])
    found = compare_pairs(others + np.array([2.0, 3.0, -1.0]), others, np.arange(3))
    assert found.mean == pytest.approx(4 / 3) and found.p == 4 / 8 and not found.identical
    assert found.low < found.mean < found.high
    assert found.detectable == pytest.approx(detectable_difference(np.array([2.0, 3.0, -1.0]), np.arange(3)))
    same = compare_pairs(others, others, np.arange(3))
    assert (same.mean, same.low, same.high, same.p, same.detectable, same.identical) == (0, 0, 0, 1, None, True)
    assert compare_pairs(others + 1, others, np.full(3, 7)).detectable is None, "one image has no spread"


def test_a_paired_difference():
    second = np.random.default_rng(0).normal(size=len(CLUSTERS))
    assert bootstrap_difference(second - 0.5, second, CLUSTERS) == pytest.approx((-0.5, -0.5, -0.5))
    first = np.random.default_rng(1).normal(size=len(CLUSTERS))
    assert bootstrap_difference(first, second, CLUSTERS)[1:] == paired_interval(first, second, CLUSTERS)


def test_a_ratio_of_means():
    """(1 + 0 + 2) / (2 + 2 + 2), always a half of 4 where both stand still; 0 has no ratio."""
    ratio, bounds = bootstrap_ratio(np.array([1.0, 0.0, 2.0]), np.full(3, 2.0), np.arange(3))
    assert ratio == 0.5 and bounds is not None and bounds[0] == 0 and bounds[1] == 1
    assert bootstrap_ratio(np.ones(3), np.zeros(3), np.arange(3)) == (None, None)
    original = np.random.default_rng(2).uniform(1, 2, 6)
    assert bootstrap_ratio(0.9 * original, original, np.arange(6) // 2)[1] == pytest.approx((0.9, 0.9))
    assert compute_ratio(1.0, 4.0, np.ones(3), np.full(3, 4.0)) == (0.25, (0.25, 0.25))
    assert compute_ratio(1.0, 0.0, np.ones(3), np.ones(3))[0] is None
