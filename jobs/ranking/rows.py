"""The tables of the ablation: layer scores, agreement of criteria, steps of a search for sets, activation ranges."""

from typing import TypedDict

from jobs.core.rows import Rows


class LayerScore(TypedDict):
    """What removing one decoder layer costs by one criterion."""

    criterion: str
    layer: int  # zero-based
    loss: float  # in the criterion's own unit; high: much is lost
    score: float  # in the unit of the criterion's label
    low: float  # 95 %, in that unit
    high: float
    rank: int  # 1 is removed first
    rank_low: int  # 95 %
    rank_high: int
    apart_from_next: bool  # from the layer of the next rank
    samples: int  # questions


class Agreement(TypedDict):
    """How far two criteria rank the layers alike."""

    criterion: str
    other: str
    tau: float | None  # Kendall's tau-b, -1 to 1; None: undefined


class SearchStep(TypedDict):
    """One set of layers that a search measured."""

    round: str
    removed: list[int]
    loss: float  # in the criterion's own unit


class RangeRow(TypedDict):
    """Recorded activations of one input of a decoder layer's linears: the largest |x| of every channel."""

    layer: int  # zero-based
    projections: str  # the linears that share the input
    channels: int
    median: float  # over the channels, here and below
    p99: float
    max: float
    outliers: int  # channels above OUTLIER times the median
    channel_ids: list[int]  # of the largest of them
    ratios: list[float]  # theirs to the median


SCORES = Rows("scores.parquet", LayerScore)
AGREEMENT = Rows("agreement.parquet", Agreement)
STEPS = Rows("steps.parquet", SearchStep)
RANGES = Rows("ranges.parquet", RangeRow)
