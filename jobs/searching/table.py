"""run_dir/search/rows.json: one row per setting. Percent is 0 to 100; Maybe: None unless evaluated."""

from typing import Literal, NotRequired

from jobs.core.facts import Interval
from jobs.core.rows import Maybe, Rows
from jobs.judging.rows import JudgedColumns

Cost = Literal["memory_gib", "ms_per_token"]  # the columns that a budget limits


class SearchRow(JudgedColumns):
    """One setting: what it is, how it ended, what it takes, what it scores, and how to make it again."""

    method: str  # uniform: a setting of the space; joint: a choice of jobs.joint
    setting: str  # its name for people
    depth: int  # layers removed
    recovery: str
    quantizer: str
    bits: int  # 16: not rounded, 0: layers differ
    width: NotRequired[float]  # share of heads and channels kept; absent in rows of older code: 1
    status: str  # done, over budget, screened out, failed, open
    reason: str | None
    estimate_gib: float  # fullest device
    screen_pct: Maybe[float]
    screen_interval_pct: Maybe[Interval]
    screen_images: Maybe[int]
    judge_identity: str | None  # equal where the same judge scored
    judgement: str | None  # artifact
    baseline_pct: Maybe[float]
    baseline_interval_pct: Maybe[Interval]
    images: Maybe[int]
    answers: Maybe[int]
    unanswered: Maybe[int]
    exact_pct: Maybe[float]
    name_accuracy: Maybe[float]  # percent
    name_accuracy_interval: Maybe[Interval]
    params: Maybe[int]
    weight_bytes: Maybe[int]
    memory_gib: Maybe[float]  # fullest device
    memory_kind: Maybe[str]  # where memory_gib is from
    process_peak_gib: Maybe[float]
    ms_per_token: Maybe[float]  # median
    ms_per_token_p5_p95: Maybe[Interval]  # 5th and 95th percentile
    first_token_ms: Maybe[float]
    device: Maybe[str]
    threads: Maybe[int]
    removed_layers: list[int]  # zero-based
    simulated: bool  # stored in 16 bits
    unpacked: bool  # by transformers, when it is loaded
    seconds_alone: float  # of all its stages, whoever made them
    gpu_hours_alone: float | None  # None: unknown
    checkpoint: str
    evaluation: str  # artifact
    screen: str | None  # artifact
    artifacts: list[str]
    conditions: str  # hash of data, model, way of evaluation: rows with the same compare
    command: str
    score_pct: Maybe[float]  # what settings are compared by
    score_interval_pct: Maybe[Interval]
    score_kind: str  # judge or baseline


ROWS = Rows("rows.json", SearchRow)
