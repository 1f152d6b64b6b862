"""What crosses a process: frozen dataclasses of plain values and paths. Imports neither torch nor transformers."""

import math
from dataclasses import dataclass
from typing import Any

# A loaded LLaVA-shaped model: LlavaForConditionalGeneration and its likes, quantized or adapted or neither.
# (torch types every attribute of a Module as Tensor | Module, which says less than nothing about such a model.)
Llava = Any

# What keeps 16 bits, under the names of published checkpoints and of transformers 5: a quantizer silently rounds a
# part that it does not recognise, and a loader silently fills one with random weights.
_PARTS = ("vision_tower", "multi_modal_projector", "lm_head")
NOT_ROUNDED = [*_PARTS, *(f"model.{name}" for name in _PARTS), "language_model.lm_head"]


class GateError(ValueError):
    """A checkpoint that must not be published, and why."""


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


# The bits that each quantizer has. awq and rtn are stored packed at 4 bits alone: see QuantizeSettings.simulated.
QUANTIZER_BITS = {"awq": (2, 3, 4, 8), "rtn": (2, 3, 4, 8), "hqq": (2, 3, 4, 8), "nf4": (4,), "int8": (8,)}
NF4_BLOCK = 64
HQQ_CHECKPOINT = "prunella-hqq"  # quant_method in config.json: actors.checkpoint.loading alone reads what hqq rounded
PACKED_CHECKPOINT = "compressed-tensors"  # quant_method in config.json of layers with bits of their own


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
        if self.method not in QUANTIZER_BITS:
            raise ValueError(f"Unknown quantizer {self.method!r}: choose {', '.join(QUANTIZER_BITS)}.")
        allowed = QUANTIZER_BITS[self.method]
        if self.bits not in allowed:
            has = " or ".join(map(str, allowed))
            raise ValueError(f"{self.method} has {has} bits; quantize.bits is {self.bits}: set it to {has}.")
        if self.method == "nf4" and self.group_size != NF4_BLOCK:
            raise ValueError(f"nf4 has blocks of {NF4_BLOCK}; quantize.group_size is {self.group_size}.")
        if self.method == "hqq" and self.group_size % 8:
            raise ValueError(f"hqq's groups are multiples of 8; quantize.group_size is {self.group_size}.")

    @property
    def simulated(self) -> bool:
        """Whether the checkpoint holds rounded weights in 16 bits, because no packed layout is loaded everywhere."""
        return self.method in ("awq", "rtn") and self.bits != 4
