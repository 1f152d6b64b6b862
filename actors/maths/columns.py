"""A table's columns as arrays, a row each: what formulas take. numpy only."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

Number = float | int  # to beartype an int is no float
Array = np.ndarray  # what jobs hand from one formula to the next, and do not look into


def to_floats(values: Sequence[Number]) -> Float[np.ndarray, "n"]:
    """Return numbers as float64, in their own unit; True is 1."""
    return np.array(values, dtype=float)


def to_percent(values: Sequence[Number], top: Number) -> Float[np.ndarray, "n"]:
    """Return scores from 0 to `top` in percent of `top`."""
    return to_floats(values) * 100 / top


def to_flags(values: Sequence[bool]) -> Bool[np.ndarray, "n"]:
    """Return what is so or not, row by row."""
    return np.array(values, dtype=bool)


def to_places(values: Sequence[int]) -> Int[np.ndarray, "n"]:
    """Return places in a list, counted from 0."""
    return np.array(values, dtype=np.int64)


def number_names(names: Sequence) -> Int[np.ndarray, "n"]:
    """Return each name's place among the different ones, sorted: which cluster (image, pair of raters) a row is of.

    names: all strings or all numbers.
    """
    return np.unique(names, return_inverse=True)[1]
