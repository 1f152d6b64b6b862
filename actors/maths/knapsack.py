"""One option per layer under a memory budget, chosen exactly: a multiple-choice knapsack (Kellerer, Pferschy and
Pisinger 2004, chapter 11), solved as an integer program by HiGHS through scipy.

minimise sum_l damage[l, choice_l] subject to sum_l bytes[m, l, choice_l] <= budget[m] in every moment m,
since what is in memory differs between moments of the work. Damage and bytes are tables of single changes:
one layer takes another option, and the other layers stay as they are.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import Bounds, LinearConstraint, milp

INFEASIBLE = 2  # scipy's status for a program without a solution
SCALE = 1e3  # the largest damage is scaled to this: HiGHS treats differences below 1e-6 as ties


def tabulate_bytes(
    held: Sequence[Sequence[Sequence[int]]], base: Sequence[int], budget: int
) -> tuple[Int[np.ndarray, "m l o"], list[int]]:
    """Return bytes_MLO, what every option adds in every moment, and each moment's remaining budget (bytes).

    base: bytes of each moment with all layers at one option. held: by layer and option, bytes of each moment if that
    layer has that option instead. The differences are returned, so the option of `base` adds 0.
    """
    bytes_MLO = np.array([[np.array(option) - np.array(base) for option in layer] for layer in held], dtype=np.int64)
    return np.ascontiguousarray(np.moveaxis(bytes_MLO, -1, 0)), [int(budget - moment) for moment in base]


def tabulate_damage(
    at: float, measured: Mapping[tuple[int, int], float], centre: Sequence[int], options: Sequence[int]
) -> Float[np.ndarray, "l o"]:
    """Return the damage of changing one layer's option in the choice `centre`, whose loss is `at`.

    measured: the loss of every single change, by (layer, number of the option). The centre's own options do 0 damage;
    an option that was not measured (it would remove the last layer) does infinite damage.
    """
    centre_LO = np.array(centre)[:, None] == np.array(options)
    damage_LO = np.where(centre_LO, 0.0, np.inf)
    for place, loss in measured.items():
        damage_LO[place] = loss - at
    return damage_LO


def predict_damage(at: float, damage_LO: Float[np.ndarray, "l o"], picked: Sequence[int]) -> float:
    """Return a choice's predicted loss if single changes add up; picked: the column of each layer's option."""
    return at + float(sum(damage_LO[layer, option] for layer, option in enumerate(picked)))


def best_choices(
    damage_LO: Float[np.ndarray, "layers options"],
    bytes_MLO: Int[np.ndarray, "moments layers options"],
    budget_M: Sequence[int],
    count: int = 1,
    excluded: Sequence[Sequence[int]] = (),
    near: tuple[Sequence[int], int] | None = None,
) -> list[tuple[int, ...]]:
    """Return the `count` choices of least summed damage within the budgets (bytes), best first; or all, if fewer.

    A choice names one option (column) per layer. Options whose damage is not finite are not available. `excluded`
    choices are never returned; near = (choice, n) allows only choices that differ from it in at most n layers.
    ValueError: no choice fits a moment's budget; it gives the least possible bytes. RuntimeError: HiGHS failed.
    """
    layers, options = damage_LO.shape
    available_LO = np.isfinite(damage_LO)
    if not available_LO.any(1).all():
        raise ValueError(f"Layer {int(np.argmin(available_LO.any(1)))} has no option of finite damage.")
    fits = []
    for bytes_LO, budget in zip(bytes_MLO, budget_M, strict=True):
        least = int(np.where(available_LO, bytes_LO, np.iinfo(np.int64).max).min(1).sum())
        if least > budget:
            raise ValueError(f"No choice fits into {budget} bytes: the least possible is {least} bytes.")
        # Integers divided by their greatest divisor: a violation is at least 1, far above HiGHS's tolerance.
        unit = int(np.gcd.reduce(bytes_LO, axis=None)) or 1
        fits.append(LinearConstraint((bytes_LO // unit).reshape(1, -1), -np.inf, budget // unit))
    damage = np.where(available_LO, damage_LO, 0.0)
    largest = np.abs(damage).max() or 1.0
    one_each = LinearConstraint(np.kron(np.eye(layers), np.ones(options)), 1, 1)
    if near is not None:
        fits.append(LinearConstraint(_cut(near[0], options), layers - near[1], np.inf))
    cuts = [_cut(choice, options) for choice in excluded]
    choices: list[tuple[int, ...]] = []
    while len(choices) < count:
        constraints = [one_each, *fits, *([LinearConstraint(np.array(cuts), -np.inf, layers - 1)] if cuts else [])]
        solved = milp(
            damage.reshape(-1) * (SCALE / largest),
            integrality=np.ones(damage.size),
            bounds=Bounds(0, available_LO.reshape(-1).astype(float)),
            constraints=constraints,
            options={"mip_rel_gap": 0},
        )
        if solved.status == INFEASIBLE:
            break
        if solved.x is None:
            raise RuntimeError(f"The integer program was not solved: {solved.message}")
        choice = tuple(int(option) for option in solved.x.reshape(layers, options).argmax(1))
        choices.append(choice)
        cuts.append(_cut(choice, options))
    return choices


def _cut(choice: Sequence[int], options: int) -> np.ndarray:
    """Return the row whose product with a choice counts the layers in which it equals `choice` (a no-good cut)."""
    row = np.zeros((len(choice), options))
    row[np.arange(len(choice)), list(choice)] = 1
    return row.reshape(-1)
