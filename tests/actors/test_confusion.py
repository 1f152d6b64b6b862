"""Confusion matrix and macro F1: by hand, and against scikit-learn's."""

import numpy as np
import pytest
from sklearn.metrics import f1_score

from actors.maths.confusion import bootstrap_macro_f1, confusion, macro_f1, macro_f1_draws

# Two classes, and a third column for answers that name none: F1 = 2*2/(3+2) and 2*1/(2+2).
TRUTH, GIVEN = np.array([0, 0, 0, 1, 1]), np.array([0, 0, 1, 1, 2])


def test_by_hand():
    counts = confusion(TRUTH, GIVEN, 2, 3)
    assert counts.tolist() == [[2, 1, 0], [0, 1, 1]]
    assert macro_f1(counts) == pytest.approx((4 / 5 + 2 / 4) / 2)


def test_a_class_that_never_occurs_is_left_out_even_if_it_is_named():
    counts = confusion(np.array([0, 0]), np.array([0, 1]), 2, 2)
    assert macro_f1(counts) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="0 answers"):
        macro_f1(np.zeros((2, 2), dtype=int))


def test_equal_to_scikit_learn():
    rng = np.random.default_rng(0)
    truth, given = rng.integers(8, size=200), rng.integers(11, size=200)
    expected = f1_score(truth, given, labels=range(8), average="macro", zero_division=0)
    assert macro_f1(confusion(truth, given, 8, 11)) == pytest.approx(expected)


def test_draws_are_the_macro_f1_of_resampled_images():
    """Against drawing the rows themselves, image by image."""
    clusters = np.array([5, 5, 9, 9, 2])
    draws = macro_f1_draws(TRUTH, GIVEN, 2, clusters, draws=50, seed=3)
    picks = np.random.default_rng(3).integers(3, size=(50, 3))
    for value, pick in zip(draws, picks, strict=True):
        rows = np.concatenate([np.flatnonzero(clusters == [2, 5, 9][one]) for one in pick])
        assert value == pytest.approx(macro_f1(confusion(TRUTH[rows], GIVEN[rows], 2, 3)))
    assert len(np.unique(draws)) > 3


def test_macro_f1_with_its_draws():
    """Truth 0 0 1 1, given 0 1 1 and nothing: F1 of 2/3 and 2/4; also where the last class is never given."""
    truth, given = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 4])
    value, draws = bootstrap_macro_f1(truth, given, 2, np.arange(4))
    assert value == pytest.approx((2 / 3 + 2 / 4) / 2)
    assert (draws == macro_f1_draws(truth, given, 2, np.arange(4))).all()
    assert bootstrap_macro_f1(truth, np.zeros(4, dtype=int), 2, np.arange(4))[0] == pytest.approx((2 * 2 / 6 + 0) / 2)
