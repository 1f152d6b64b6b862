"""What is not dominated, against looking at every pair."""

from hypothesis import given
from hypothesis import strategies as st

from actors.maths.fronts import find_undominated


def test_by_hand():
    """At cost 1 the score of 3 beats that of 2; 5 at cost 4 is dearer but better; 3 at cost 2 is no better."""
    assert find_undominated([4, 1, 1, 2], [5, 2, 3, 3]) == [2, 0]
    assert find_undominated([1, 1], [2, 2]) == [0]
    assert find_undominated([], []) == []


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12))
def test_against_every_pair(points):
    """point: cost, score."""

    def dominated(one, other) -> bool:
        return other != one and other[0] <= one[0] and other[1] >= one[1]

    found = find_undominated([cost for cost, _ in points], [score for _, score in points])
    expected = {one for one in points if not any(dominated(one, other) for other in points)}
    assert [points[place] for place in found] == sorted(expected)
    assert all(points.index(points[place]) == place for place in found)
