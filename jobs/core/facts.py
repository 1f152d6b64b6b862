"""What each kind of stage records in its manifest: written by `Run.make`, read by `Run.facts`. Percent is 0 to 100."""

from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict

Interval = list[float]  # [low, high], 95 %


class Facts(TypedDict):
    """What every manifest holds."""

    name: str
    recipe: dict[str, Any]  # kind, version, settings, names of the parents
    seconds: float  # to make it, interrupted attempts included
    files: NotRequired[dict[str, list[Any]]]  # by path: bytes and SHA-256; absent in artifacts of older code
    gpu_seconds: NotRequired[float]  # GPUs times seconds; absent where a killed attempt held an unknown part


class PrepareFacts(Facts):
    """Of a data artifact."""

    images: dict[str, int]  # by split
    shares: dict[str, dict[str, int]]  # by class: images, test_images, groups, test_groups
    conversations: int
    skipped: int  # files and questions


class AblateFacts(Facts):
    """Of the scores of single layers."""

    order: list[int]  # zero-based layers, first removed first
    outliers: list[int]  # layers that stay, since removing one raises perplexity far more than others
    pairs_apart: int  # pairs of layers whose paired interval excludes 0
    pairs: int
    failed: dict[str, str]  # reason by sample_id


class SelectFacts(Facts):
    """Of a search for a set of layers; scores in the unit of the criterion's label."""

    removed: list[int]
    one_shot: list[int]  # the layers of the best single scores
    score: float
    one_shot_score: float
    gain: float  # loss that the search saves against one shot, in the criterion's own unit
    gain_interval: Interval
    sets_measured: int
    failed: dict[str, str]  # reason by sample_id


class CheckpointFacts(Facts):
    """Of every checkpoint that is made here."""

    gate: dict[str, Any]  # what each check of the gate found; sums: SHA-256 by tensor
    history: list[dict[str, Any]]  # source and steps, for the model card


class PruneFacts(CheckpointFacts):
    """Of a pruned checkpoint."""

    removed: list[int]  # zero-based layers of the model before
    layers: int  # that are left


class StatesFacts(Facts):
    """Of a teacher's hidden states."""

    conversations: int
    bytes: int  # on disk


class NarrowFacts(CheckpointFacts):
    """Of a checkpoint with fewer heads and channels."""

    head_groups: int  # of every layer: key/value heads, with the query heads that read them
    channels: int  # of every layer's MLP
    compensated: bool  # the mean contribution of the removed groups was added to biases


class RecoverFacts(CheckpointFacts):
    """Of a fine-tuned checkpoint."""

    conversations: int
    first_loss: float  # nats per answer token
    last_loss: float


class PatchFacts(CheckpointFacts):
    """Of a checkpoint with linear maps in place of removed layers."""

    layers: list[int]  # its layers with a map, zero-based
    errors: list[float]  # of each: squared error of what it passes on, as a share of that without a map


class QuantizeFacts(CheckpointFacts):
    """Of a rounded checkpoint, of one method or of mixed bits."""

    linears: int
    rounded_weights: int
    bits_per_weight: float  # with scales and all else that is stored for it
    simulated: bool  # stored in 16 bits
    nominal_bytes: int  # of the whole checkpoint at these bits
    calibration_tokens: NotRequired[int]  # of a calibrated method


class ExportFacts(CheckpointFacts):
    """Of a checkpoint in another program's format."""

    sizes: dict[str, int]  # bytes by file
    checked: str  # in words
    agreement: NotRequired[dict[str, Any]]  # of actors.export.comparison; absent where the check did not run
    plain_agreement: NotRequired[dict[str, Any]]


class RoundedFacts(Facts):
    """Of decoder layers that were rounded to several numbers of bits, a file each."""

    layers: int
    bytes: int  # of the files
    calibration_tokens: NotRequired[int]


class RangesFacts(Facts):
    """Of recorded activation ranges."""

    outliers: int  # channels
    largest_outliers: list[dict[str, Any]]  # layer, projections, channel, ratio to the input's median


class Metrics(TypedDict):
    """What the scored answers of one model say (jobs.scoring.metrics)."""

    images: int
    answers: int
    unanswered: int
    baseline_pct: float
    baseline_interval_pct: Interval
    exact_pct: float
    exact_interval_pct: Interval
    name_accuracy: float | None  # percent; None, here and below, where the name is not asked for
    name_accuracy_interval: Interval | None
    name_verdicts: dict[str, int]
    macro_f1_pct: float | None
    macro_f1_interval_pct: Interval | None
    confusion: dict[str, Any] | None  # classes, unnamed, counts
    given_name: dict[str, dict[str, Any]]  # right and not_right: scores of the other questions
    loop_pct: float
    loop_interval_pct: Interval
    without_stop_pct: float
    without_stop_interval_pct: Interval


class Profile(TypedDict):
    """Memory and latency, measured in fresh processes (actors.footprint, actors.profiler). Times: median, batch 1."""

    device: str
    threads: int
    torch: str
    transformers: str
    params: int
    layers: int  # of the decoder
    bits: int  # of a decoder weight, the fewest
    stored_bits: int  # of the type that the checkpoint is stored in
    weight_bytes: int
    decode: str  # plain or static
    timed_tokens: int  # of each run
    peak_restarted: bool  # False: the peak of the runs includes loading
    peak_memory_bytes: int
    peak_memory_kind: str
    baseline_bytes: dict[str, int]  # by kind, before the model was loaded
    load_peak_bytes: dict[str, int]
    steady_peak_bytes: dict[str, int]
    preprocess_ms: float
    preprocess_ms_p5_p95: Interval  # 5th and 95th percentile, here and below
    encode_ms: float
    encode_ms_p5_p95: Interval
    prefill_ms: float
    prefill_ms_p5_p95: Interval
    first_token_ms: float
    first_token_ms_p5_p95: Interval
    decode_ms: float
    decode_ms_p5_p95: Interval
    total_ms: float
    total_ms_p5_p95: Interval
    ms_per_token: float
    ms_per_token_p5_p95: Interval
    naive_ms_per_token: float  # end to end over all tokens, the paper's column
    naive_ms_per_token_p5_p95: Interval
    timed_runs: int
    rounds: int  # processes
    ms_per_token_rounds: list[float]  # the median of each process


class EvaluateFacts(Facts):
    """Of an evaluation."""

    metrics: Metrics
    controls: dict[str, dict[str, Any] | None] | None  # by control (blank, swapped): scores and falls in points
    profile: Profile


class JudgeFacts(Facts):
    """Of one evaluation's verdicts."""

    tally: dict[str, Any]  # scored, total, judge_pct, its interval and bounds, clusters, unit
    unscored: dict[str, int]  # by reason
    controls: dict[str, Any]  # count, missed, by_kind, misses, unbuilt, unscored
    judge: str
    identity: dict[str, Any]
    calibrated: bool


FACTS: dict[str, type] = {
    "data": PrepareFacts,
    "ablate": AblateFacts,
    "select": SelectFacts,
    "prune": PruneFacts,
    "narrow": NarrowFacts,
    "states": StatesFacts,
    "patch": PatchFacts,
    "recover": RecoverFacts,
    "quantize": QuantizeFacts,
    "mixed": QuantizeFacts,
    "export": ExportFacts,
    "rounded": RoundedFacts,
    "ranges": RangesFacts,
    "evaluate": EvaluateFacts,
    "judge": JudgeFacts,
}  # by the kind of the stage


def check_facts(kind: str, noted: Mapping[str, Any]) -> None:
    """Assert that a stage records nothing but the facts of its kind."""
    unknown = noted.keys() - FACTS[kind].__annotations__.keys() if kind in FACTS else ()
    assert not unknown, f"{FACTS[kind].__name__} has no {sorted(unknown)}"
