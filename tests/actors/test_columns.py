"""Columns of a table as arrays."""

import numpy as np
import pytest

from actors.maths.columns import number_names, to_flags, to_floats, to_percent, to_places


@pytest.mark.parametrize("names", [["b", "a", "b", "c"], [20, 3, 20, 100], ("b", "a", "b", "c")])
def test_names_are_numbered_in_their_order(names):
    assert number_names(names).tolist() == [1, 0, 1, 2]


def test_percent_by_hand():
    assert to_percent([0, 1, 4], 4).tolist() == [0, 25, 100]
    assert to_percent([0.5], 1.0).tolist() == [50]


def test_kinds():
    """Also of no rows."""
    given = (to_floats, [1, 0.5], np.float64), (to_flags, [True, False], np.bool_), (to_places, [1, 0], np.int64)
    for convert, values, kind in given:
        assert convert([]).dtype == kind and convert(values).tolist() == values
    assert to_floats([True, False]).tolist() == [1, 0]
    assert len(number_names([])) == 0
