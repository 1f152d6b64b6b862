"""One option per layer under a memory budget, chosen exactly: a multiple-choice knapsack (Kellerer, Pferschy and
Pisinger 2004, chapter 11), solved as an integer program by HiGHS through scipy.

minimise sum_l damage[l, choice_l] subject to sum_l bytes[m, l, choice_l] <= budget[m] in every moment m: what is in
memory differs from one moment of the work to another, and none may exceed its budget.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import Bounds, LinearConstraint, milp

INFEASIBLE = 2  # scipy's status for a program without a solution
SCALE = 1e3  # of the largest damage: HiGHS takes differences below 1e-6 for ties


def best_choices(
    damage_LO: Float[np.ndarray, "layers options"],
    bytes_MLO: Int[np.ndarray, "moments layers options"],
    budget_M: Sequence[int],
    count: int = 1,
    excluded: Sequence[Sequence[int]] = (),
    near: tuple[Sequence[int], int] | None = None,
) -> list[tuple[int, ...]]:
    """Return the `count` choices of least summed damage within the budgets (bytes), best first; or all, if fewer.

    A choice names one option (column) per layer. A layer does not have an option whose damage is not finite. `excluded`
    choices are never returned; near (choice, n): only those that differ from it in at most n layers are. ValueError: no
    choice fits a moment; it gives the least possible bytes. RuntimeError: HiGHS gave up.
    """
    layers, options = damage_LO.shape
    there_LO = np.isfinite(damage_LO)
    if not there_LO.any(1).all():
        raise ValueError(f"Layer {int(np.argmin(there_LO.any(1)))} has no option of finite damage.")
    fits = []
    for bytes_LO, budget in zip(bytes_MLO, budget_M, strict=True):
        least = int(np.where(there_LO, bytes_LO, np.iinfo(np.int64).max).min(1).sum())
        if least > budget:
            raise ValueError(f"No choice fits into {budget} bytes: the least possible is {least} bytes.")
        # Whole numbers, as small as they get: a row that is wrong is wrong by 1 or more, far above HiGHS's tolerance.
        unit = int(np.gcd.reduce(bytes_LO, axis=None)) or 1
        fits.append(LinearConstraint((bytes_LO // unit).reshape(1, -1), -np.inf, budget // unit))
    damage = np.where(there_LO, damage_LO, 0.0)
    largest = np.abs(damage).max() or 1.0
    one_each = LinearConstraint(np.kron(np.eye(layers), np.ones(options)), 1, 1)
    if near is not None:
        fits.append(LinearConstraint(_cut(near[0], options), layers - near[1], np.inf))
    cuts = [_cut(choice, options) for choice in excluded]
    found: list[tuple[int, ...]] = []
    while len(found) < count:
        given = [one_each, *fits, *([LinearConstraint(np.array(cuts), -np.inf, layers - 1)] if cuts else [])]
        solved = milp(
            damage.reshape(-1) * (SCALE / largest),
            integrality=np.ones(damage.size),
            bounds=Bounds(0, there_LO.reshape(-1).astype(float)),
            constraints=given,
            options={"mip_rel_gap": 0},
        )
        if solved.status == INFEASIBLE:
            break
        if solved.x is None:
            raise RuntimeError(f"The integer program was not solved: {solved.message}")
        choice = tuple(int(option) for option in solved.x.reshape(layers, options).argmax(1))
        found.append(choice)
        cuts.append(_cut(choice, options))
    return found


def _cut(choice: Sequence[int], options: int) -> np.ndarray:
    """Return the row whose product with a choice counts the layers in which it equals `choice` (a no-good cut)."""
    row = np.zeros((len(choice), options))
    row[np.arange(len(choice)), list(choice)] = 1
    return row.reshape(-1)
