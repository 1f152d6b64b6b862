"""What crosses a process: frozen dataclasses of plain values and paths. Imports neither torch nor transformers."""

import math
from dataclasses import dataclass
from enum import Enum
from typing import Any

from actors.quantizers.table import find_method

# A loaded LLaVA-shaped model: LlavaForConditionalGeneration and its likes, quantized or adapted or neither.
# (torch types every attribute of a Module as Tensor | Module, which says less than nothing about such a model.)
Llava = Any

# What keeps 16 bits, under the names of published checkpoints and of transformers 5: a quantizer silently rounds a
# part that it does not recognise, and a loader silently fills one with random weights.
_PARTS = ("vision_tower", "multi_modal_projector", "lm_head")
NOT_ROUNDED = [*_PARTS, *(f"model.{name}" for name in _PARTS), "language_model.lm_head"]


class GateError(ValueError):
    """A checkpoint that must not be published, and why."""


class Change(Enum):
    """How a checkpoint was made from its parent, and so what the gate demands of it."""

    PRUNED = "pruned"  # nothing but layers went: the parent without them gives the same logits
    TRAINED = "trained"  # the decoder's linears have other weights; everything else is the parent's
    ROUNDED = "rounded"  # the decoder's linears are rounded, and compute what they did within their bits


@dataclass(frozen=True)
class ModelSpec:
    """Which checkpoint to load, and how: see `actors.checkpoint.loading.load_model`.

    sharers: how many processes plan their batches with the main memory of one machine, where the model is on a CPU.
    """

    path: str
    dtype: str = "float32"
    revision: str | None = None
    trust_remote_code: bool = False
    gpus: float = 1
    sharers: int = 1

    @property
    def loading(self) -> dict[str, Any]:
        """The arguments of `load_model`."""
        return {name: value for name, value in vars(self).items() if name != "sharers"}


@dataclass(frozen=True)
class Sample:
    """One question about one image (a path that the worker can read)."""

    id: str
    image: str
    question: str


@dataclass(frozen=True)
class Conversation:
    """One question about one image (None: about none), and its reference answer."""

    id: str
    image: str | None
    question: str
    reference: str


@dataclass(frozen=True)
class DraftContext:
    """What an earlier round found out about a question: the whole model's answer, and the base's token ids."""

    whole: str
    draft: list[int]


@dataclass(frozen=True)
class LoraSettings:
    """Hyper-parameters of one fine-tuning; see jobs.config.schema.RecoverConfig for their units."""

    method: str
    rank: int
    alpha: int
    dropout: float
    epochs: float
    batch: int
    micro_batch: int
    learning_rate: float
    seed: int

    def steps(self, conversations: int) -> int:
        """Return how many optimiser steps `epochs` passes over the conversations take."""
        return max(1, math.ceil(self.epochs * conversations / self.batch))


@dataclass(frozen=True)
class QuantizeSettings:
    """How to round; see jobs.config.schema.QuantizeConfig for the fields' units.

    ValueError: no such method, bits that it does not have, or a group size that it cannot have.
    """

    method: str
    bits: int
    group_size: int
    clip: bool
    awq_search: str

    def __post_init__(self):
        method = find_method(self.method)
        if self.bits not in method.bits:
            has = " or ".join(map(str, method.bits))
            raise ValueError(f"{self.method} has {has} bits; quantize.bits is {self.bits}: set it to {has}.")
        if method.block and self.group_size != method.block:
            raise ValueError(f"{self.method} has blocks of {method.block}; quantize.group_size is {self.group_size}.")
        if method.groups and self.group_size % method.groups:
            raise ValueError(
                f"{self.method}'s groups are multiples of {method.groups}; quantize.group_size is {self.group_size}."
            )

    @property
    def simulated(self) -> bool:
        """Whether the checkpoint holds rounded weights in 16 bits, because no packed layout is loaded everywhere."""
        return find_method(self.method).simulated(self.bits)
