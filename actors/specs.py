"""What processes pass each other: frozen dataclasses of plain values. Imports neither torch nor transformers."""

from dataclasses import dataclass
from enum import Enum
from typing import Any

from actors.quantizers.table import find_method

# A loaded LLaVA-shaped model: LlavaForConditionalGeneration and its likes, quantized or adapted or neither.
# (Any, because torch types every attribute of a Module as Tensor | Module.)
Llava = Any

# The parts that keep 16 bits, by their names in published checkpoints and in transformers 5. Both are needed: a
# quantizer silently rounds a part that is not listed, and a loader silently fills such a part with random weights.
_PARTS = ("vision_tower", "multi_modal_projector", "lm_head")
NOT_ROUNDED = [*_PARTS, *(f"model.{name}" for name in _PARTS), "language_model.lm_head"]


class GateError(ValueError):
    """A checkpoint that must not be published, and why."""


class Change(Enum):
    """How a checkpoint was made from its parent, and so what the gate demands of it."""

    PRUNED = "pruned"  # only layers were removed: the parent without them gives the same logits
    NARROWED = "narrowed"  # heads and channels were removed: the parent with them masked gives the same logits
    TRAINED = "trained"  # what was trained has other weights; everything else is the parent's
    ROUNDED = "rounded"  # the decoder's linears are rounded, and compute the same up to the rounding error


@dataclass(frozen=True)
class ModelSpec:
    """Which checkpoint to load, and how: see `actors.checkpoint.loading.load_model`.

    sharers: how many processes divide one machine's main memory when they plan their batches; 1 on GPUs.
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
    """One question about an image (None: about no image), and its reference answer."""

    id: str
    image: str | None
    question: str
    reference: str


@dataclass(frozen=True)
class DraftContext:
    """Results of an earlier round for a question: the whole model's answer, and the token ids of the base's answer."""

    whole: str
    draft: list[int]


@dataclass(frozen=True)
class QuantizeSettings:
    """How to round; see jobs.config.schema.QuantizeConfig for the fields' units.

    ValueError: no such method, or bits or a group size that it does not support.
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
            raise ValueError(
                f"{self.method} has blocks of {method.block}; quantize.group_size is {self.group_size}: set it to "
                f"{method.block}."
            )
        if method.groups and self.group_size % method.groups:
            raise ValueError(
                f"{self.method}'s groups are multiples of {method.groups}; quantize.group_size is {self.group_size}."
            )

    @property
    def simulated(self) -> bool:
        """Whether rounded weights are stored in 16 bits, because the layout does not pack these bits."""
        return find_method(self.method).simulated(self.bits)


@dataclass(frozen=True)
class ExportSettings:
    """What to export; see jobs.config.export.ExportConfig."""

    format: str
    type: str
    class_token: str
