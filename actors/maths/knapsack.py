"""One option per layer under a memory budget, chosen exactly: a multiple-choice knapsack (Kellerer, Pferschy and
Pisinger 2004, chapter 11), solved as an integer program by HiGHS through scipy.

minimise sum_l damage[l, choice_l] subject to sum_l bytes[m, l, choice_l] <= budget[m] in every moment m: what is in
memory differs from one moment of the work to another, and none may exceed its budget. What it is given are tables of
single changes: an option for one layer, and the others as they are.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import Bounds, LinearConstraint, milp

INFEASIBLE = 2  # scipy's status for a program without a solution
SCALE = 1e3  # of the largest damage: HiGHS takes differences below 1e-6 for ties


def tabulate_bytes(
    held: Sequence[Sequence[Sequence[int]]], base: Sequence[int], budget: int
) -> tuple[Int[np.ndarray, "m l o"], list[int]]:
    """Return bytes_MLO of every option, and what each moment leaves for the layers (bytes).

    base: what each moment holds with all layers at one option; held: by layer and option, what it holds with that
    option for that layer instead. The program's bytes are the differences, so `base` itself counts 0.
    """
    bytes_MLO = np.array([[np.array(option) - np.array(base) for option in layer] for layer in held], dtype=np.int64)
    return np.ascontiguousarray(np.moveaxis(bytes_MLO, -1, 0)), [int(budget - moment) for moment in base]


def tabulate_damage(
    at: float, measured: Mapping[tuple[int, int], float], centre: Sequence[int], options: Sequence[int]
) -> Float[np.ndarray, "l o"]:
    """Return what a change of one layer costs beside `centre`, which loses `at` (the damage's unit).

    measured: the loss of every single change, by (layer, number of the option). The centre's own option costs 0; one
    that was not measured (it would remove the last layer that is left) is no choice: infinite.
    """
    own_LO = np.array(centre)[:, None] == np.array(options)
    damage_LO = np.where(own_LO, 0.0, np.inf)
    for place, loss in measured.items():
        damage_LO[place] = loss - at
    return damage_LO


def predict_damage(at: float, damage_LO: Float[np.ndarray, "l o"], picked: Sequence[int]) -> float:
    """Return the loss of a choice (a column per layer) if single changes add up: `at` and the damage of each layer."""
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
    choices: list[tuple[int, ...]] = []
    while len(choices) < count:
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
        choices.append(choice)
        cuts.append(_cut(choice, options))
    return choices


def _cut(choice: Sequence[int], options: int) -> np.ndarray:
    """Return the row whose product with a choice counts the layers in which it equals `choice` (a no-good cut)."""
    row = np.zeros((len(choice), options))
    row[np.arange(len(choice)), list(choice)] = 1
    return row.reshape(-1)
