"""The configuration of every job: one schema, one default per field, torch-free.

A field's unit stands in its description; jobs.core.options reads the values.
"""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from actors.criteria import CRITERIA, set_criteria
from actors.quantizers.table import METHODS, bits_of
from jobs.config.estimate import EstimateConfig
from jobs.config.export import ExportConfig
from jobs.config.joint import JointConfig
from jobs.config.judge import JudgeConfig
from jobs.config.pruning import PruneConfig, RecoverConfig
from jobs.config.search import SearchConfig
from jobs.config.section import Bits, Count, Criterion, Dtype, Quantizer, Section


class ModelConfig(Section):
    """The LLaVA-shaped model to compress."""

    path: str = Field("actors/derm_tiny/checkpoint", description="checkpoint folder, or hub id (owner/name)")
    revision: str | None = Field(None, description="hub commit, tag or branch; unset: the newest")
    dtype: Dtype = Field("float32", description="compute type (float16 on a GPU, float32 on a CPU)")
    trust_remote_code: bool = Field(False, description="run code that the checkpoint brings along")


class ClassConfig(Section):
    """One class of the image collection."""

    name: str = Field(description="the disease as answers spell it")
    match: list[str] = Field(
        [], description="patterns of paths below data.root (* and ?); unset: a folder of that name"
    )
    synonyms: list[str] = Field([], description="other spellings that count as the name")
    texts: dict[str, str] = Field({}, description="texts for the questions' templates, e.g. about: ...")


class QuestionConfig(Section):
    """One question asked about every image."""

    id: str = Field(description="short name; the question called name asks for the disease")
    text: str = Field(description="the question")
    answer: str | None = Field(None, description="reference, with {name} or {<key of texts>}; unset: annotations")


class DataConfig(Section):
    """The image collection and what is asked about it."""

    root: str | None = Field(None, description="folder of images, read recursively; unset: images/ in run_dir")
    draw_per_class: int = Field(0, ge=0, description="lesions of derm-tiny to draw into root per class; 0: draw none")
    annotations: str | None = Field(
        None,
        description="CSV below root with columns path, question_id, answer; also question, if it asks its own",
    )
    classes: list[ClassConfig] = Field([], description="the classes (YAML list)")
    questions: list[QuestionConfig] = Field([], description="the questions (YAML list)")
    splits: dict[str, list[str]] = Field(
        {}, description="train and test patterns of the collection's own split; empty: Prunella splits"
    )
    test_fraction: float = Field(0.1, gt=0, lt=1, description="share of images for the test split (fraction)")
    group_pattern: str | None = Field(None, description="regular expression; group 1 of a file name is its series")
    near_duplicate_bits: int = Field(
        2, ge=-1, le=32, description="largest perceptual-hash distance of near-duplicates (bits); -1: off"
    )


class ReplicasConfig(Section):
    """The actors that hold the model."""

    count: Count | Literal["auto"] = Field("auto", description="replicas; auto: as many as the cluster can hold")
    gpus: float = Field(
        0, ge=0, description="GPUs of each replica; 0: CPU; a fraction: a shared one; 2: half the layers on each"
    )
    cpus: float = Field(1, gt=0, description="cores (and threads) of each replica")
    max_rows: Count = Field(1024, description="most answers in one batch (rows); fewer where memory is short")

    @field_validator("gpus")
    @classmethod
    def _whole_gpus(cls, gpus: float) -> float:
        if gpus > 1 and gpus % 1:
            raise ValueError(
                f"replicas.gpus is {gpus}: give a fraction below 1 (a shared GPU), or 1, 2, ... whole ones."
            )
        return gpus


class GenerationConfig(Section):
    """How answers are decoded: always greedily."""

    max_new_tokens: Count = Field(200, description="longest answer (tokens)")


class AblateConfig(Section):
    """Scoring layers by removing them (paper, eq. 2-5)."""

    samples: Count = Field(64, description="calibration questions from the training split (questions)")
    per_image: Count | None = Field(
        None,
        description="draw images, and at most this many questions about each: they share the image's prefill, but "
        "fewer images make wider intervals; unset: draw questions one by one (questions)",
    )
    unit: Count = Field(
        4, description="most questions of one unit of work, which keeps those about one image together (questions)"
    )
    criterion: Criterion = Field("answer_similarity", description="what ranks the layers (paper: answer_similarity)")
    compare: list[Criterion] = Field(
        ["perplexity", "kl", "block_influence", "block_influence_image", "block_influence_text", "magnitude+"],
        description="other criteria, measured for the report's table of rank agreement (YAML list)",
    )
    candidates: Literal["outliers", "paper", "all"] | list[int] = Field(
        "outliers",
        description="layers that may be removed, zero-based; outliers: all but those whose removal costs far more "
        "perplexity than the others'; paper: all but 0, 1 and the last",
    )
    embedder: str = Field(
        "sentence-transformers/all-MiniLM-L6-v2",
        description="sentence-transformer: hub id, folder, or package:NAME (a package that carries one)",
    )


def _only_bits_of_methods() -> str:
    only = [f"{name} {method.only_bits}" for name, method in METHODS.items() if method.only_bits]
    return ", ".join([*only, "none 16"])


def _simulated_bits() -> str:
    found = {name: [bits for bits in method.bits if method.simulated(bits)] for name, method in METHODS.items()}
    return "; ".join(f"{name} with {', '.join(map(str, bits))}" for name, bits in found.items() if bits)


def _own_groups() -> str:
    own = {name: method.block for name, method in METHODS.items() if not method.groups}
    return ", ".join(f"{name} {block or 'all of a row'}" for name, block in own.items())


class QuantizeConfig(Section):
    """Rounding the language model's linear layers."""

    method: Quantizer = Field(
        "awq",
        description="; ".join(f"{name}: {method.words}" for name, method in METHODS.items())
        + "; none: the model stays as it is",
    )
    bits: Bits = Field(
        4,
        description=f"bits of a weight (bits); unset: 4; of methods without a choice: {_only_bits_of_methods()}; "
        f"simulated, i.e. rounded weights stored in 16 bits, for studies of accuracy: {_simulated_bits()}",
    )
    group_size: Count = Field(
        64, description=f"input channels that share a scale (channels); without a choice: {_own_groups()}"
    )
    calibration_samples: Count = Field(
        32, description="training conversations drawn; AWQ uses the longer half, cut to one length (conversations)"
    )
    calibration_images: bool = Field(True, description="AWQ: calibrate on images and text; off: on text alone")
    clip: bool = Field(True, description="AWQ: search clipping of the weights, too")
    awq_search: Literal["autoawq", "layerwise"] = Field(
        "autoawq",
        description="AWQ: autoawq (the package; the whole model in memory) or layerwise (built in; a layer at a time)",
    )

    @model_validator(mode="before")
    @classmethod
    def _only_bits(cls, values: Any) -> Any:
        method = values.get("method") if isinstance(values, dict) else None
        if method in ("none", *METHODS) and values.get("bits") is None:
            return {**values, "bits": bits_of(method, cls.model_fields["bits"].default)}
        return values


class EvaluateConfig(Section):
    """Answers on the test split, and what they cost."""

    limit: int | None = Field(None, ge=1, description="test images to use (images); unset: all")
    warmup_runs: int = Field(10, ge=0, description="unmeasured runs before the latency is measured (runs)")
    timed_runs: Count = Field(30, description="measured runs, batch 1 (runs)")
    timed_tokens: int = Field(128, ge=2, description="new tokens of each measured run (tokens)")
    decode: Literal["plain", "static"] = Field(
        "plain",
        description="the decoding that is timed: plain generate, or static: a static cache and a step that is captured "
        "once (a CUDA graph on a GPU, torch.compile on a CPU); the answers are always those of plain",
    )
    embedder: str | None = Field(None, description="sentence-transformer of the baseline; unset: ablate.embedder")
    controls: bool = Field(
        True,
        description="score the answers to a blank image, and to one of another class: does the model use the image?",
    )


class ProfileConfig(Section):
    """Comparing the memory and latency of checkpoints; evaluate says how each run is measured."""

    models: list[str] = Field([], description="checkpoint folders or hub ids (YAML list); empty: model.path")
    rounds: Count = Field(3, description="fresh processes of each checkpoint; the checkpoints take turns (processes)")
    cap_gib: float | None = Field(
        None,
        gt=0,
        description="memory in which each tries to answer the test questions (GiB, with interpreter or CUDA context)",
    )


class PublishConfig(Section):
    """Where a finished checkpoint goes."""

    to: str | None = Field(None, description="new folder, storage URI (s3://bucket/name), or hf://owner/name")


class Config(Section):
    """Everything a job needs."""

    run_dir: str = Field("runs/derm-tiny", description="folder of results; on a cluster a path all nodes share")
    seed: int = Field(0, ge=0, lt=2**32, description="seed of every random choice")
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    replicas: ReplicasConfig = ReplicasConfig()
    generation: GenerationConfig = GenerationConfig()
    ablate: AblateConfig = AblateConfig()
    prune: PruneConfig = PruneConfig()
    recover: RecoverConfig = RecoverConfig()
    quantize: QuantizeConfig = QuantizeConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    judge: JudgeConfig = JudgeConfig()
    profile: ProfileConfig = ProfileConfig()
    estimate: EstimateConfig = EstimateConfig()
    export: ExportConfig = ExportConfig()
    joint: JointConfig = JointConfig()
    search: SearchConfig = SearchConfig()
    publish: PublishConfig = PublishConfig()

    @model_validator(mode="after")
    def _search_needs_a_measured_criterion(self) -> "Config":
        if self.prune.search != "one_shot" and not CRITERIA[self.ablate.criterion].on_sets:
            raise ValueError(
                f"prune.search {self.prune.search} measures sets of layers, which ablate.criterion "
                f"{self.ablate.criterion} cannot: choose {', '.join(set_criteria())}, or prune.search one_shot."
            )
        return self
