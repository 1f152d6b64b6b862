"""Weighted kappa: by hand, against scikit-learn, and its interval against simulated truth."""

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from actors.maths.agreement import mean_kappa, measure_signed_error


def kappa(first, second, **settings) -> tuple[float, float, float]:
    """One pair of raters, every answer its own cluster."""
    count = len(first)
    arguments = {"pairs_N": np.zeros(count, dtype=int), "clusters_N": np.arange(count)} | settings
    return mean_kappa(np.array(first, dtype=float), np.array(second, dtype=float), **arguments)


def test_by_hand():
    """Labels 0 4 4 0 against 0 4 0 0: the squares sum to 16; over all 16 pairs they sum to (2 x 3 + 2 x 1) x 16 = 128,
    a mean of 32 for four answers. kappa = 1 - 16 / 32."""
    assert kappa([0, 4, 4, 0], [0, 4, 0, 0])[0] == pytest.approx(0.5)
    assert kappa([0, 1, 2, 3, 4], [0, 1, 2, 3, 4]) == pytest.approx((1, 1, 1))
    assert kappa([0, 4], [4, 0])[0] == pytest.approx(-1)


@pytest.mark.parametrize("seed", range(5))
def test_against_scikit_learn(seed):
    """60 noisy answers, some labels never given; names of pairs and clusters do not matter."""
    rng = np.random.default_rng(seed)
    first = rng.integers(5, size=60)
    second = np.clip(first + rng.integers(-1, 3, size=60), 0, 4)
    expected = cohen_kappa_score(first, second, labels=range(5), weights="quadratic")
    value, low, high = kappa(first, second, pairs_N=np.full(60, 7), clusters_N=100 - np.arange(60) // 3)
    assert value == pytest.approx(expected, abs=1e-12)
    assert low < value < high


def test_pairs_of_raters_are_averaged():
    """Two pairs with 40 and 20 answers: the weighted mean of scikit-learn's kappas."""
    rng = np.random.default_rng(1)
    first = rng.integers(5, size=60)
    second = np.clip(first + rng.integers(-2, 3, size=60), 0, 4)
    pairs = np.repeat([0, 1], [40, 20])
    parts = [
        cohen_kappa_score(first[pairs == p], second[pairs == p], labels=range(5), weights="quadratic") for p in (0, 1)
    ]
    assert kappa(first, second, pairs_N=pairs)[0] == pytest.approx((40 * parts[0] + 20 * parts[1]) / 60)


def test_undefined():
    """Nothing varies: there is no kappa, and no warning; one pair that varies is enough."""
    assert np.isnan(kappa([3, 3, 3], [3, 3, 3])).all()
    value = kappa([3, 3, 0, 4], [3, 3, 0, 4], pairs_N=np.array([0, 0, 1, 1]))[0]
    assert value == pytest.approx(1)


def test_interval_covers_over_images_and_not_over_answers():
    """39 images x 3 answers whose errors the image shares: the 95 % interval covers the true kappa in 89-99 % of 150
    runs over images, in fewer than 88 % over answers."""
    images = np.repeat(np.arange(39), 3)

    def draw_labels(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        shown = np.repeat(rng.normal(2, 1.2, count // 3), 3) + rng.normal(0, 0.4, count)
        wrong = np.repeat(rng.normal(0, 1.0, count // 3), 3) + rng.normal(0, 0.3, count)
        return np.clip(np.round(shown), 0, 4), np.clip(np.round(shown + wrong), 0, 4)

    truth = cohen_kappa_score(*draw_labels(np.random.default_rng(0), 300_000), labels=range(5), weights="quadratic")
    rng, covered = np.random.default_rng(2), np.zeros(2)
    for run in range(150):
        first, second = draw_labels(rng, 117)
        for column, clusters in enumerate((images, np.arange(117))):
            _, low, high = kappa(first, second, clusters_N=clusters, draws=300, seed=run)
            covered[column] += low <= truth <= high
    assert 0.89 <= covered[0] / 150 <= 0.99
    assert covered[1] / 150 < 0.88


def test_signed_error_by_hand():
    """Labels 4 and 1; people gave 2 and 3, and 1: 4 - 2.5 and 0, a mean of 0.75; drawn are 0, 0.75 and 1.5."""
    assert measure_signed_error([4, 1], [[2, 3], [1]], np.arange(2)) == (0.75, 0.0, 1.5)
    assert measure_signed_error([4, 1], [[2, 3], [1]], np.zeros(2, dtype=int)) == (0.75, 0.75, 0.75)
