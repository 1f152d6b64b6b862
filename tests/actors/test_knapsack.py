"""The choice per layer: exact against counting all choices."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.maths.knapsack import best_choices, predict_damage, tabulate_bytes, tabulate_damage


def test_a_case_counted_by_hand():
    damage = np.array([[9.0, 2.0, 0.0], [1.0, 0.5, 0.0]])  # removed, 4 bits, 16 bits
    sizes = np.array([[0, 4, 16], [0, 4, 16]])
    assert best_choices(damage, sizes[None], [16], 3) == [(2, 0), (1, 1), (1, 0)]  # 1.0, 2.5, 3.0
    assert best_choices(damage, sizes[None], [16], 1, excluded=[(2, 0)]) == [(1, 1)]


def test_one_byte_too_little_is_too_little():
    damage, sizes = np.array([[1.0, 0.0]]), np.array([[100_000_000, 200_000_001]])
    assert best_choices(damage, sizes[None], [200_000_001]) == [(1,)]
    assert best_choices(damage, sizes[None], [200_000_000]) == [(0,)]


def test_all_choices_and_no_more():
    damage, sizes = np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([[1, 2], [1, 2]])
    assert len(best_choices(damage, sizes[None], [4], 10)) == 4


def test_the_least_possible_is_said():
    damage, sizes = np.array([[np.inf, 1.0, 0.0], [2.0, 1.0, 0.0]]), np.array([[0, 40, 160], [0, 40, 160]])
    with pytest.raises(ValueError, match=r"39 bytes: the least possible is 40 bytes"):
        best_choices(damage, sizes[None], [39])
    with pytest.raises(ValueError, match="Layer 1 has no option"):
        best_choices(np.array([[1.0], [np.nan]]), np.array([[[1], [1]]]), [9])


def test_near_a_choice():
    damage, sizes = np.array([[3.0, 1.0, 0.0]] * 4), np.array([[[0, 4, 16]] * 4])
    found = best_choices(damage, sizes, [64], 100, near=((0, 0, 0, 0), 1))
    assert len(found) == 1 + 4 * 2
    assert found[0] == (2, 0, 0, 0) or sum(found[0]) == 2


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_it_is_exact(data):
    layers, options, moments = (data.draw(st.integers(1, most)) for most in (5, 4, 2))
    shape = (layers, options)
    cells = layers * options
    numbers = st.lists(st.integers(-50, 10_000), min_size=cells, max_size=cells)
    damage = np.array(data.draw(numbers)).reshape(shape) / 1000
    rows = st.lists(st.integers(0, 3_000_000), min_size=moments * cells, max_size=moments * cells)
    sizes = np.array(data.draw(rows)).reshape(moments, *shape)
    budgets = [data.draw(st.integers(0, int(each.max(1).sum()))) for each in sizes]
    every = range(layers)
    expected = sorted(
        (float(damage[every, c].sum()), c)
        for c in product(range(options), repeat=layers)
        if all(each[every, c].sum() <= budget for each, budget in zip(sizes, budgets, strict=True))
    )
    short = [each.min(1).sum() for each, budget in zip(sizes, budgets, strict=True) if each.min(1).sum() > budget]
    if short:
        with pytest.raises(ValueError, match=str(short[0])):
            best_choices(damage, sizes, budgets)
        return
    found = best_choices(damage, sizes, budgets, 4)
    assert len(set(found)) == len(found) == min(4, len(expected))
    for each, budget in zip(sizes, budgets, strict=True):
        assert all(each[every, c].sum() <= budget for c in found)
    assert [damage[every, c].sum() for c in found] == pytest.approx([d for d, _ in expected[:4]], abs=1e-9)


def test_bytes_by_hand():
    """Two layers, options 0 and 4, two moments; the base holds 10 and 12 with both layers at 4."""
    held = [[[7, 8], [10, 12]], [[9, 9], [10, 12]]]
    bytes_MLO, left = tabulate_bytes(held, [10, 12], 15)
    assert bytes_MLO.dtype == np.int64 and left == [5, 3]
    assert bytes_MLO.tolist() == [[[-3, 0], [-1, 0]], [[-4, 0], [-3, 0]]]


def test_damage_by_hand():
    """Beside (4, 0), which loses 1: layer 0 may have 16 bits, and may not go, as it is the last one left."""
    measured = {(0, 2): 0.25, (1, 1): 0.75, (1, 2): float("nan")}
    damage = tabulate_damage(1.0, measured, (4, 0), (0, 4, 16))
    assert damage[0].tolist() == [np.inf, 0, -0.75]
    assert damage[1, :2].tolist() == [0, -0.25] and np.isnan(damage[1, 2])
    assert tabulate_damage(1.0, {(0, 0): 3.0}, (16,), (4,)).tolist() == [[2.0]], "the centre's own is no option"


def test_predicted_damage_by_hand():
    assert predict_damage(1.0, np.array([[np.inf, 0.0, -0.75], [0.0, -0.25, 2.0]]), (2, 1)) == 0
    assert predict_damage(1.0, np.array([[np.inf, 0.5]]), (0,)) == np.inf
