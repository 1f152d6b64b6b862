"""The choices of a fine-tuning: what is trained, towards what. Imports neither torch nor transformers."""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

PARTS = {
    "qlora": "LoRA on the decoder's linears, whose frozen weights are in NF4 while training",
    "lora": "LoRA on the decoder's linears",
    "projector": "the projector",
    "norms": "the decoder's norms",
    "all": "all weights but the vision tower's",
    "patch": "nothing is trained: linear maps fitted in place of the removed layers (ReplaceMe), before all else",
}
OBJECTIVES = {
    "sft": "cross-entropy of the reference answer",
    "hidden": "squared error of the last hidden states",
    "layers": "squared error of what enters each layer, against what enters that layer in the teacher",
    "logits": "KL(teacher || student)",
    "reverse_logits": "KL(student || teacher)",
}
ADAPTERS = ("qlora", "lora")
PATCH = "patch"
_SHARE = re.compile(r"(\d+(?:\.\d+)?)%")
SNAPSHOTS = "training"  # folder beside an unfinished checkpoint


@dataclass(frozen=True)
class TrainingSettings:
    """The options of one fine-tuning; see jobs.config.pruning.RecoverConfig for their units.

    train: names of PARTS. objective: the weight of every name of OBJECTIVES that counts; the weights sum to 1.
    ValueError: parts that exclude each other, or weights that are not above 0.
    """

    train: tuple[str, ...]
    objective: Mapping[str, float]
    temperature: float
    rank: int
    alpha: int
    dropout: float
    targets: tuple[str, ...]
    epochs: float
    batch: int
    micro_batch: int
    learning_rate: float
    precision: str
    gradient_checkpointing: bool | None
    checkpoint_every: int
    seed: int

    def __post_init__(self):
        check_parts(self.train)
        weigh_objectives(self.objective)

    @property
    def adapter(self) -> str | None:
        """The kind of adapter that is trained, or None."""
        return next((part for part in self.train if part in ADAPTERS), None)

    def steps(self, conversations: int) -> int:
        """Return how many optimiser steps `epochs` passes over the conversations take."""
        return max(1, math.ceil(self.epochs * conversations / self.batch))


@dataclass(frozen=True)
class Trained:
    """What a training may have changed: parts, targets of an adapter (none: all), the layers of a patch (None: all)."""

    parts: tuple[str, ...]
    targets: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None


def check_parts(parts: Collection[str]) -> None:
    """ValueError: a part that there is not, none at all, or parts that exclude each other."""
    for part in parts:
        if part not in PARTS:
            raise ValueError(
                f"recover.train: there is no {part!r}; give {', '.join(PARTS)}, or several: lora+projector."
            )
    if not parts:
        raise ValueError(f"recover.train is empty: give {', '.join(PARTS)}, or several of them.")
    if "all" in parts and set(parts) - {"all", PATCH}:
        raise ValueError(
            "recover.train: 'all' trains every weight outside the tower, so it takes no other part but patch."
        )
    if set(ADAPTERS) <= set(parts):
        raise ValueError("recover.train: give lora or qlora, not both.")


def weigh_objectives(weights: Mapping[str, float]) -> dict[str, float]:
    """Return the weights scaled to a sum of 1; ValueError: an objective that there is not, or no positive weight."""
    for name, weight in weights.items():
        if name not in OBJECTIVES:
            raise ValueError(
                f"recover.objective: there is no {name!r}; give {', '.join(OBJECTIVES)}, or a mapping to weights."
            )
        if not 0 < weight < math.inf:
            raise ValueError(
                f"recover.objective gives {name!r} the weight {weight}: give a number above 0, or leave it out."
            )
    if not weights:
        raise ValueError(f"recover.objective is empty: give {', '.join(OBJECTIVES)}, or several of them.")
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def needs_teacher(objective: Mapping[str, float]) -> bool:
    """Tell whether an objective compares with a teacher."""
    return set(objective) != {"sft"}


def recovery_label(parts: Collection[str], objective: Mapping[str, float], fraction: float = 1.0) -> str:
    """Return the name of a recovery for people: lora, projector+5%, lora+sft+hidden."""
    share = [] if fraction == 1 else [f"{100 * fraction:g}%"]
    return "+".join([*parts, *(objective if needs_teacher(objective) else ()), *share])


def read_recovery(label: str) -> dict[str, Any]:
    """Return the options that a label names: train, and objective and fraction if it has them.

    ValueError: an unknown word, or parts that exclude each other.
    """
    options: dict[str, Any] = {"train": []}
    objectives = []
    for word in label.split("+"):
        if word in PARTS:
            options["train"].append(word)
        elif word in OBJECTIVES:
            objectives.append(word)
        elif (share := _SHARE.fullmatch(word)) and 0 < float(share[1]) <= 100:
            options["fraction"] = float(share[1]) / 100
        else:
            raise ValueError(
                f"There is no recovery {word!r}: join by + names of {', '.join([*PARTS, *OBJECTIVES])}, and a share of "
                "the data as 5%; none is no recovery."
            )
    check_parts(options["train"])
    return options | ({"objective": weigh_objectives(dict.fromkeys(objectives, 1.0))} if objectives else {})
