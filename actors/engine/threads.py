"""How many of a CPU's cores a piece of work is worth."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

SMALL_FLOP = 5e7  # of one linear: below it, waking another core takes about as long as what it would do


@contextmanager
def threads_for(tokens: int, width: int, widest: int) -> Iterator[None]:
    """Compute on one thread where the largest linear, over so many tokens, is little work for a CPU."""
    before = torch.get_num_threads()
    if 2 * tokens * width * widest < SMALL_FLOP:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
