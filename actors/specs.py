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


@dataclass(frozen=True)
class ModelSpec:
    """Which checkpoint to load, and how: see `actors.loading.load_model`."""

    path: str
    dtype: str = "float32"
    revision: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Sample:
    """One question about one image (a path that the worker can read)."""

    id: str
    image: str
    question: str


@dataclass(frozen=True)
class Conversation:
    """One question about one image, and its reference answer."""

    id: str
    image: str
    question: str
    reference: str


@dataclass(frozen=True)
class LoraSettings:
    """Hyper-parameters of one fine-tuning; see jobs.config.RecoverConfig for their units."""

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
    """How to round; see jobs.config.QuantizeConfig for the fields' units."""

    method: str
    bits: int
    group_size: int
    clip: bool
