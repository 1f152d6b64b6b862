"""run_dir/joint.json: what jobs.joint measured and built. Percent is 0 to 100; Maybe: None unless evaluated."""

import json
from pathlib import Path
from typing import Literal, NotRequired, TypedDict

from cluster.artifacts import write_text
from jobs.core.facts import Interval
from jobs.core.rows import Maybe, check_rows
from jobs.judging.rows import JudgedColumns

JOINT = "joint.json"
Damage = Literal["kl", "answer_similarity"]  # what is minimised


class SingleRow(TypedDict):
    """One layer changed alone."""

    layer: int  # zero-based
    option: int  # bits; 0: removed
    kl: float  # nats per token
    answer_similarity: float  # 1 - cosine


class TriedRow(TypedDict):
    """One choice that was measured."""

    round: int
    choice: list[int]  # bits by layer; 0: removed
    predicted: float | None  # damage, in its unit
    kl: Maybe[float]  # nats per token
    answer_similarity: Maybe[float]  # 1 - cosine
    bytes: int  # estimate, all devices


class JointRow(JudgedColumns):
    """One choice that was built, or why it could not be."""

    method: str
    choice: list[int]  # bits by layer; 0: removed
    status: str  # done or failed
    reason: str | None
    removed_layers: list[int]  # zero-based
    round: int
    predicted: float | None  # damage, in its unit
    kl: Maybe[float]  # nats per token
    answer_similarity: Maybe[float]  # 1 - cosine
    estimate_bytes: int  # all devices
    baseline_pct: Maybe[float]
    baseline_interval_pct: Maybe[Interval]
    exact_pct: Maybe[float]
    name_accuracy: Maybe[float]  # percent
    name_accuracy_interval: Maybe[Interval]
    images: Maybe[int]
    answers: Maybe[int]
    unanswered: Maybe[int]
    weight_bytes: Maybe[int]
    params: Maybe[int]
    ms_per_token: Maybe[float]
    judge_identity: str | None
    judgement: str | None  # artifact
    checkpoint: str  # folder
    evaluation: str  # artifact
    score_kind: str  # judge or baseline
    best_uniform: bool
    difference_pct: Maybe[float]  # points, from the best uniform setting, paired
    difference_interval_pct: Maybe[Interval]
    difference_p_holm: Maybe[float]
    difference_detectable_pct: Maybe[float]
    difference_finding: str | None
    difference_pairs: int
    exact_difference_pct: Maybe[float]  # as above, of verbatim answers
    exact_difference_interval_pct: Maybe[Interval]
    exact_difference_p_holm: Maybe[float]
    exact_difference_detectable_pct: Maybe[float]
    exact_difference_finding: Maybe[str]
    exact_difference_pairs: int


class Additivity(TypedDict):
    """How far predicted damages are from measured ones."""

    choices: int
    mean_predicted: float
    mean_measured: float
    spearman: float | None


class JointFile(TypedDict):
    """The whole file."""

    budget_bytes: int
    damage: str
    samples: int  # calibration questions
    seed: int
    per_image: NotRequired[int]
    additivity: Additivity
    candidates: list[JointRow]
    singles: list[SingleRow]
    tried: list[TriedRow]


def write_joint(folder: Path, content: JointFile) -> Path:
    """Write run_dir/joint.json, atomically, and return it."""
    check_rows([content], JointFile)
    check_rows(content["candidates"], JointRow)
    check_rows(content["singles"], SingleRow)
    check_rows(content["tried"], TriedRow)
    path = folder / JOINT
    write_text(path, json.dumps(content, indent=1))
    return path


def read_joint(folder: Path) -> JointFile | None:
    """Return what jobs.joint recorded; None if there is nothing, or older code wrote it."""
    path = folder / JOINT
    recorded: JointFile | None = json.loads(path.read_text()) if path.is_file() else None
    required = JointRow.__required_keys__
    return recorded if recorded and all(row.keys() >= required for row in recorded["candidates"]) else None
