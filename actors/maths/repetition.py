"""Loops in generated text: what a model does when too many of its layers are gone. numpy only."""

from collections.abc import Sequence

import numpy as np

LONGEST_BLOCK = 32  # tokens of the block that repeats
COPIES = 3  # least number of its copies in a row
SHORTEST_LOOP = 8  # least number of tokens of all copies: "..." and "itchy, itchy, itchy" are no loops


def loop_length(tokens: Sequence[int]) -> int:
    """Return the tokens of an answer's longest loop, 0 if it has none.

    A loop is a block of at most 32 tokens, repeated at least 3 times in a row, of 8 tokens or more in all. The
    beginning of another copy at its end counts.
    """
    ids = np.asarray(tokens)
    longest = 0
    for block in range(1, min(LONGEST_BLOCK, len(ids) // COPIES) + 1):
        length = block + _longest_run(ids[block:] == ids[:-block])
        if length >= max(COPIES * block, SHORTEST_LOOP):
            longest = max(longest, length)
    return longest


def _longest_run(same: np.ndarray) -> int:
    """Return the longest run of True."""
    breaks = np.flatnonzero(np.concatenate([[True], ~same, [True]]))
    return int(np.diff(breaks).max()) - 1
