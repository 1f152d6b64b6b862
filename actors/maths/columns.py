"""Turns a table's columns into arrays, which the formulas take. numpy only."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

Number = float | int  # beartype does not accept an int as a float
Array = np.ndarray  # jobs pass it from one formula to the next, and do not look into it


def to_floats(values: Sequence[Number]) -> Float[np.ndarray, "n"]:
    """Return numbers as float64, in their own unit; True is 1."""
    return np.array(values, dtype=float)


def to_percent(values: Sequence[Number], top: Number) -> Float[np.ndarray, "n"]:
    """Return scores from 0 to `top` in percent of `top`."""
    return to_floats(values) * 100 / top


def to_flags(values: Sequence[bool]) -> Bool[np.ndarray, "n"]:
    """Return a column of booleans."""
    return np.array(values, dtype=bool)


def to_places(values: Sequence[int]) -> Int[np.ndarray, "n"]:
    """Return a column of indices, counted from 0."""
    return np.array(values, dtype=np.int64)


def number_names(names: Sequence) -> Int[np.ndarray, "n"]:
    """Return each name's index among the sorted distinct names: the row's cluster (image, pair of raters).

    names: all strings or all numbers.
    """
    return np.unique(names, return_inverse=True)[1]
