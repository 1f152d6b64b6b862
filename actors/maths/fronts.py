"""Which of several things no other dominates (Pareto)."""

from collections.abc import Sequence

from actors.maths.columns import Number


def find_undominated(costs: Sequence[Number], scores: Sequence[Number]) -> list[int]:
    """Return the places of what is not dominated, cheapest first; of those equal in both, the first.

    One is dominated if another has at least its score at the same cost or less, and is better in one of the two. A
    column of costs and one of scores, each in any unit; high scores are good. No number is NaN.
    """
    front: list[int] = []
    for place in sorted(range(len(costs)), key=lambda i: (costs[i], -scores[i])):
        if not front or scores[place] > scores[front[-1]]:
            front.append(place)
    return front
