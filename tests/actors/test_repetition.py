"""Loops in generated text, on token lists made by hand."""

import numpy as np
import pytest

from actors.maths.repetition import loop_length


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([], 0),
        ([7], 0),
        ([1, 2, 3, 4, 5, 6, 7, 8, 9, 10], 0),
        ([7] * 8, 8),
        ([7] * 7, 0),  # three dots, or a word three times, are no loop
        ([1, 2, 3] * 3, 9),
        ([1, 2, 3] * 2 + [1, 2], 0),  # twice and a bit
        ([9, 8, *[1, 2, 3] * 3, 1, 2], 11),  # the beginning of a fourth copy counts
        ([*[1, 2, 3] * 3, 5, 6], 9),  # a loop that it left again
        ([*[4] * 9, 5, *[1, 2] * 8], 16),  # the longest of two
        ([*range(32)] * 3, 96),
        ([*range(33)] * 3, 0),  # too long a block
    ],
)
def test_loops_by_hand(tokens, expected):
    assert loop_length(tokens) == expected


def test_equal_to_the_definition_spelled_out():
    """Every span, every block: the longest s with t[i] = t[i - p] throughout, s >= 3 p and s >= 8."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        tokens = rng.integers(3, size=int(rng.integers(1, 30))).tolist()
        spans = [
            end - start
            for start in range(len(tokens))
            for end in range(start + 8, len(tokens) + 1)
            for block in range(1, (end - start) // 3 + 1)
            if all(tokens[i] == tokens[i - block] for i in range(start + block, end))
        ]
        assert loop_length(tokens) == max(spans, default=0)
