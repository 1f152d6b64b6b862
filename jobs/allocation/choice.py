"""Choose one option per layer under a memory budget: measure single changes, and combine them by an integer program.

Damages do not simply add up, so the choices that the program proposes are measured as a whole. A later round starts
from the best choice so far: it measures every single change of it, and the program searches near it.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any, cast, get_args

from actors.maths.columns import Array
from actors.maths.knapsack import best_choices, predict_damage, tabulate_bytes, tabulate_damage
from jobs.ranking.measurements import ChoiceMeasurements, check_ranked
from jobs.searching.joint_table import Damage, SingleRow, TriedRow

LOG = logging.getLogger("jobs.allocation")

Choice = tuple[int, ...]
REMOVED, WHOLE = 0, 16
BOTH: tuple[Damage, ...] = get_args(Damage)


@dataclass(frozen=True)
class Memory:
    """The memory of choices by actors.estimate, with quantized weights as the compressed-tensors layout stores them.

    shapes: actors.estimate's Architecture; setting: its Setting, of method "mixed", whose bits are not read; context:
    what the devices hold beside the model (bytes). Several devices are counted together.
    """

    shapes: Any
    setting: Any
    options: tuple[int, ...]
    context: int

    def moments(self, choice: Choice) -> list[int]:
        """Return the bytes that each moment of the work holds: weights, contexts, and what it needs beside them."""
        from actors.estimate import estimate

        sizes = estimate(self.shapes, replace(self.setting, bits=choice))
        return [sizes["weight_bytes"] + self.context + held for held in sizes["phases"].values()]

    def total(self, choice: Choice) -> int:
        """Return the bytes of the largest moment."""
        return max(self.moments(choice))

    @property
    def least(self) -> Choice:
        """The smallest choice: all layers at the fewest bits, or, if layers may be removed, only one of them."""
        layers, fewest = len(self.shapes.layers), next(bits for bits in self.options if bits)
        if REMOVED not in self.options:
            return (fewest,) * layers
        singles = (
            tuple(fewest if layer == present else REMOVED for layer in range(layers)) for present in range(layers)
        )
        return min(singles, key=self.total)

    def program(self, budget: int) -> tuple[Array, list[int]]:
        """Return bytes_MLO of every option, and the bytes that each moment leaves for the layers (`tabulate_bytes`).

        Memory that depends on several layers (a linear while it is unpacked) is counted with all layers at the fewest
        bits, where it is largest.
        """
        fewest = next(bits for bits in self.options if bits)
        base = (fewest,) * len(self.shapes.layers)
        held = [
            [self.moments((*base[:layer], bits, *base[layer + 1 :])) for bits in self.options]
            for layer in range(len(base))
        ]
        return tabulate_bytes(held, self.moments(base), budget)


def single_changes(choice: Choice, options: Sequence[int]) -> dict[tuple[int, int], Choice]:
    """Return every choice that differs from `choice` in one layer, by (layer, number of the option)."""
    changes = {
        (layer, option): (*choice[:layer], bits, *choice[layer + 1 :])
        for layer in range(len(choice))
        for option, bits in enumerate(options)
        if bits != choice[layer]
    }
    return {key: changed for key, changed in changes.items() if any(changed)}


class AllocationSearch:
    """The rounds of one search. `tried`: all choices within the budget that were measured, with their rows."""

    def __init__(self, measured: ChoiceMeasurements, memory: Memory, budget: int, joint):
        self._measured, self._memory, self._joint = measured, memory, joint
        self._budget, self._options = budget, memory.options
        self._bytes, self._left = memory.program(budget)
        self.tried: dict[Choice, TriedRow] = {}
        self.singles: list[SingleRow] = []

    def losses(self, choices: Sequence[Choice], criterion: str, label: str) -> list[float]:
        """Return the measured damage of choices."""
        return self._measured.losses(criterion, list(choices), label=label).ranked_K.tolist()

    def fits(self, choice: Choice) -> bool:
        """Tell whether a choice is within the budget."""
        return self._memory.total(choice) <= self._budget

    @property
    def best(self) -> list[Choice]:
        """The measured choices, least damage first; of equals, the smaller one first.

        Choices whose damage is not finite are left out.
        """
        damage: Damage = self._joint.damage
        finite = [choice for choice, row in self.tried.items() if isfinite(row[damage])]
        return sorted(finite, key=lambda choice: (self.tried[choice][damage], self._memory.total(choice)))

    def run(self, uniform: Sequence[Choice]) -> None:
        """Run all rounds; the first one also measures and predicts the `uniform` choices."""
        centre: Choice = self._measured.whole
        for number in range(1, self._joint.rounds + 1):
            proposed = self._round(number, centre, uniform if number == 1 else ())
            LOG.info(f"joint: round {number} tried {proposed} choices; best so far {format_choice(self.best[0])}")
            if self.best[0] == centre:
                return
            centre = self.best[0]

    def _round(self, number: int, centre: Choice, others: Sequence[Choice]) -> int:
        changes, label = single_changes(centre, self._options), f"round {number}"
        damage: Damage = self._joint.damage
        centre_loss, *losses = self.losses([centre, *changes.values()], damage, f"{label}, single changes")
        check_ranked(damage, [centre_loss])
        check_ranked(damage, losses)
        damage_LO = tabulate_damage(centre_loss, dict(zip(changes, losses, strict=True)), centre, self._options)
        if number == 1:
            self._note_singles(changes)
        nothing = (self._options.index(REMOVED),) * len(centre) if REMOVED in self._options else None
        near = None if number == 1 else (tuple(map(self._options.index, centre)), self._joint.changes)
        picks = best_choices(
            damage_LO, self._bytes, self._left, self._joint.proposed, [nothing] if nothing else [], near
        )
        choices = [tuple(self._options[option] for option in picked) for picked in picks]
        choices += [choice for choice in others if choice not in choices]
        sums = {
            choice: predict_damage(centre_loss, damage_LO, [*map(self._options.index, choice)]) for choice in choices
        }
        predicted = {choice: total for choice, total in sums.items() if isfinite(total)}
        if number > 1:
            choices += [changed for changed in changes.values() if self.fits(changed) and changed not in choices]
        values = self.losses(choices, damage, f"{label}, {damage} of choices")
        check_ranked(damage, values)
        for choice, value in zip(choices, values, strict=True):
            row: TriedRow = {
                "round": number,
                "choice": list(choice),
                "predicted": predicted.get(choice),
                "kl": None,
                "answer_similarity": None,
                "bytes": self._memory.total(choice),
            }
            row[damage] = value
            self.tried.setdefault(choice, row)
        return len(choices)

    def measure_both(self, choices: Sequence[Choice]) -> None:
        """Measure both damages of choices that were tried."""
        for damage in BOTH:
            for choice, value in zip(choices, self.losses(choices, damage, f"{damage} of the best"), strict=True):
                self.tried[choice][damage] = value

    def _note_singles(self, changes: dict[tuple[int, int], Choice]) -> None:
        values = {damage: self.losses([*changes.values()], damage, f"{damage} of single changes") for damage in BOTH}
        for place, (layer, option) in enumerate(changes):
            row: dict = {"layer": layer, "option": self._options[option]}
            row |= {damage: values[damage][place] for damage in BOTH}
            self.singles.append(cast(SingleRow, row))


def format_choice(choice: Sequence[int]) -> str:
    """Write a choice as a line: a layer's bits, - for a removed one."""
    return " ".join(str(bits) if bits else "-" for bits in choice)
