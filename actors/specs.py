"""What crosses a process: frozen dataclasses of plain values and paths. Imports neither torch nor transformers."""

from dataclasses import dataclass


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


@dataclass(frozen=True)
class QuantizeSettings:
    """How to round; see jobs.config.QuantizeConfig for the fields' units."""

    method: str
    bits: int
    group_size: int
    clip: bool
