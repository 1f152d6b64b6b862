"""run_dir/summary.json: one row per method of the paper's Table 4. Percent is 0 to 100."""

from typing import Any

from jobs.core.facts import Interval
from jobs.core.rows import Rows
from jobs.judging.rows import JudgedColumns


class SummaryRow(JudgedColumns):
    """One method: its checkpoint's size and speed, its scores, and its differences from the original's."""

    method: str
    removed_layers: list[int]  # zero-based
    quantizer: str
    params: int
    weight_bytes: int  # as stored
    bits: int  # of a decoder weight
    simulated: bool  # stored in 16 bits
    bits_per_weight: float  # with scales and all else that is stored for it
    nominal_bytes: int  # of the checkpoint at these bits
    peak_memory_bytes: int
    peak_memory_kind: str
    baseline_pct: float
    baseline_interval_pct: Interval
    exact_pct: float
    name_accuracy: float | None  # percent; None: not asked for
    name_accuracy_interval: Interval | None
    macro_f1_pct: float | None
    macro_f1_interval_pct: Interval | None
    without_stop_pct: float
    without_stop_interval_pct: Interval
    loop_pct: float
    loop_interval_pct: Interval
    controls: dict[str, Any] | None
    retention: dict[str, Any]  # by metric: percent of the original's, interval
    images: int
    answers: int
    unanswered: int
    ms_per_token: float  # median
    ms_per_token_p5_p95: Interval  # 5th and 95th percentile
    first_token_ms: float
    device: str
    threads: int
    checkpoint: str  # folder; the original's as model.path gives it
    evaluation: str  # artifact
    judge_failure: str | None  # what ended the judge
    difference_pct: float | None  # points, paired, of the baseline score
    difference_interval_pct: Interval | None
    difference_p_holm: float | None
    difference_detectable_pct: float | None  # points that 80 % power would find
    difference_finding: str | None  # identical, better, worse, unresolved
    difference_pairs: int  # questions
    name_p_holm: float | None  # McNemar's, of the disease names
    judge_difference_pct: float | None  # as above, of the judge's labels
    judge_difference_interval_pct: Interval | None
    judge_difference_p_holm: float | None
    judge_difference_detectable_pct: float | None
    judge_difference_finding: str | None
    judge_difference_pairs: int
    judge_retention: dict[str, Any] | None
    judge_given_name: dict[str, Any] | None


SUMMARY = Rows("summary.json", SummaryRow)
