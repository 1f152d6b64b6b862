"""Whole groups for a test split: as near to what is wanted as their sizes allow, by brute force."""

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.maths.splits import FAR, choose_groups


def choose(sizes, wanted: int, seed: int = 0) -> list[int]:
    return choose_groups(sizes, wanted, np.random.default_rng(seed))


def all_sums(sizes) -> set[int]:
    parts = (combinations(sizes, count) for count in range(1, len(sizes)))
    return {sum(part) for some in parts for part in some}


@pytest.mark.parametrize(
    ("sizes", "wanted", "total"),
    [
        ([1] * 20 + [12], 3, 3),  # twenty lesions and one that was photographed twelve times
        ([1] * 20 + [200], 22, 20),  # the series stays in training
        ([5, 5, 5], 2, 5),  # less than one group cannot be
        ([4, 6, 7], 8, 7),
        ([1, 12, 12, 12], 11, 12),  # one image would be 27 points too few, twelve are 3 too many
        ([1, 30, 30, 39], 20, 1),  # both miss by far: rather too few
        ([3, 3], 6, 3),  # one stays
    ],
)
def test_sums_by_hand(sizes, wanted, total):
    assert sum(sizes[place] for place in choose(sizes, wanted)) == total


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=2, max_size=9), st.floats(0.02, 0.98), st.integers(0, 3))
def test_no_subset_is_nearer(sizes, fraction, seed):
    wanted, possible = max(1, round(fraction * sum(sizes))), all_sums(sizes)
    places = choose(sizes, wanted, seed)
    total = sum(sizes[place] for place in places)
    assert places == sorted(set(places)) and total in possible
    below, above = ([s for s in possible if (s <= wanted) == side] for side in (True, False))
    if total <= wanted:
        assert total == max(below)
    else:
        assert total == min(above)
        far = FAR * sum(sizes)
        assert not below or (wanted - max(below) > far and total - wanted <= far)


def test_seeds_draw_and_sizes_share():
    """Of 60 singles and 20 pairs a tenth: pairs are chosen, too, and every single is by some seed; seeds repeat."""
    sizes = [1] * 60 + [2] * 20
    draws = [choose(sizes, 10, seed) for seed in range(200)]
    assert all(sum(sizes[place] for place in draw) == 10 for draw in draws)
    assert {Counter(sizes[place] for place in draw)[2] for draw in draws} == {2}
    assert {place for draw in draws for place in draw} >= set(range(60)) and draws[3] == choose(sizes, 10, 3)


def test_many_groups_take_no_time():
    sizes = np.random.default_rng(0).integers(1, 30, 20_000).tolist()
    assert sum(sizes[place] for place in choose(sizes, sum(sizes) // 10)) == sum(sizes) // 10
