"""The Pareto front of costs and scores."""

from collections.abc import Sequence

from actors.maths.columns import Number


def find_undominated(costs: Sequence[Number], scores: Sequence[Number]) -> list[int]:
    """Return the indices of the Pareto front, cheapest first; of points equal in both, only the first.

    A point is dominated if another has at least its score at the same cost or less, and is better in one of the two.
    costs, scores: columns in any unit, without NaN; high scores are good.
    """
    front: list[int] = []
    for place in sorted(range(len(costs)), key=lambda i: (costs[i], -scores[i])):
        if not front or scores[place] > scores[front[-1]]:
            front.append(place)
    return front
