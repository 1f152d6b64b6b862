"""Chooses whole groups for a test split: a bounded subset sum, as near to the wanted size as the groups allow."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

FAR = 0.05  # of all images: a test split that is too small by more than this share is worse than one that is too large


def choose_groups(sizes: Sequence[int], wanted: int, random: np.random.Generator) -> list[int]:
    """Return the indices of the groups of the test split, which has as nearly `wanted` images as whole groups allow.

    sizes: images of each group, all at least 1. At least one group is chosen, and one is left. Too few images are
    preferred to too many, unless they miss `wanted` by more than FAR of all and the next larger sum does not. About
    the same share of the groups of each size is chosen; `random` draws which.
    """
    places = defaultdict(list)
    for place, size in enumerate(sizes):
        places[size].append(place)
    kinds = sorted(places, reverse=True)
    reached = [1]  # bit s of reached[i]: groups of the first i sizes can add up to s
    for size in kinds:
        sums, left, many = reached[-1], len(places[size]), 1
        while left:
            step = min(many, left)
            sums |= sums << step * size
            left, many = left - step, 2 * many
        reached.append(sums)
    total = _nearest_sum(reached[-1], wanted, sum(sizes))
    chosen: list[int] = []
    for size, before in zip(reversed(kinds), reversed(reached[:-1]), strict=True):
        members = places[size]
        possible = [k for k in range(min(len(members), total // size) + 1) if before >> (total - k * size) & 1]
        share = len(members) * wanted / sum(sizes)
        count = min(possible, key=lambda k: (abs(k - share), k))
        chosen += [members[i] for i in random.permutation(len(members))[:count]]
        total -= count * size
    return sorted(chosen)


def _nearest_sum(reached: int, wanted: int, total: int) -> int:
    """Return the sum to choose, above 0 and below `total`, of those whose bit in `reached` is set."""
    low = (reached & ((1 << min(wanted, total - 1) + 1) - 1)).bit_length() - 1  # the largest up to `wanted`, 0 if none
    rest = reached >> wanted + 1
    high = wanted + 1 + (rest & -rest).bit_length() - 1 if rest else total
    if high >= total:
        return low
    far = FAR * total
    return high if low <= 0 or (wanted - low > far and high - wanted <= far) else low
