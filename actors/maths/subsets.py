"""Steps of a search over sets of layers: extend, select, mutate. A set is an increasing tuple of layers. numpy only."""

from collections.abc import Sequence

import numpy as np

Subset = tuple[int, ...]


def extend_set(parent: Subset, order: Sequence[int]) -> list[Subset]:
    """Return `parent` with one more layer, for each of `order` that it does not have."""
    return [tuple(sorted((*parent, layer))) for layer in order if layer not in parent]


def select_best(losses: Sequence[float], sets: Sequence[Subset], width: int) -> list[Subset]:
    """Return the `width` sets of least loss, best first; of equals, the one whose layers come first. No loss is NaN."""
    return [removed for _, removed in sorted(zip(losses, sets, strict=True))[:width]]


def select_earliest(losses: Sequence[float], sets: Sequence[Subset], width: int) -> list[Subset]:
    """Return the `width` sets of least loss, best first; of equals, the one that was given first. No loss is NaN."""
    return [sets[i] for i in np.argsort(np.array(losses, dtype=float), kind="stable")[:width]]


def start_stream(seed: int) -> np.random.Generator:
    """Return the random generator that all generations of a search share."""
    return np.random.default_rng(seed)


def mutate_set(random: np.random.Generator, parent: Subset, order: Sequence[int], count: int) -> list[Subset]:
    """Return up to `count` different sets, each with one to three of the parent's layers swapped for kept ones.

    The number of swaps is the smaller of two draws from 1 to 3 (EvoPress, Sieberling et al. 2024), or fewer if the
    layers do not suffice. The parent is not among the sets; if no layer of `order` is kept there are none. The state of
    `random` advances.
    """
    present = [layer for layer in order if layer not in parent]
    mutated: dict[Subset, None] = {}
    if not present:
        return []
    for _ in range(20 * count):
        if len(mutated) == count:
            break
        swaps = min(*random.integers(1, 4, size=2), len(parent), len(present))
        out, back = random.choice(parent, swaps, replace=False), random.choice(present, swaps, replace=False)
        mutated[tuple(sorted({*map(int, back), *parent} - {*map(int, out)}))] = None
    return list(mutated)
