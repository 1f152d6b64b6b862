"""Build the checkpoints of choices, recover and evaluate them, and compare them with uniform settings."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from actors.judge.verdict import TOP_LABEL
from actors.training.settings import recovery_label
from jobs import evaluate, judge, prune, recover
from jobs.allocation import mixed
from jobs.allocation.choice import REMOVED, WHOLE, AllocationSearch, Choice
from jobs.core.facts import EvaluateFacts
from jobs.core.run import Run
from jobs.core.stage import Source, Stage
from jobs.core.text import size
from jobs.scoring.differences import differences
from jobs.scoring.rows import ANSWERS, AnswerRow
from jobs.searching.joint_table import JointRow
from jobs.searching.rows import judged_columns
from jobs.searching.space import Setting
from jobs.searching.stages import Plan

LOG = logging.getLogger("jobs.allocation")

UNIFORM = "uniform"
_METRICS = ("baseline_pct", "baseline_interval_pct", "exact_pct", "name_accuracy", "name_accuracy_interval")
_COUNTS = ("images", "answers", "unanswered")
_PROFILE = ("weight_bytes", "params", "ms_per_token")


@dataclass(frozen=True)
class BuiltChoice:
    """A choice, its name, its plan, and why it could not be made or evaluated (None: it could)."""

    method: str
    choice: Choice
    plan: Plan
    failure: str | None


def with_pruning(run: Run, layers: int, order: Sequence[int] | None = None) -> Run:
    """Return the same run with another number of layers, or these layers, to remove."""
    pruning = run.config.prune.model_copy(update={"layers": layers, "order": None if order is None else list(order)})
    return Run(run.config.model_copy(update={"prune": pruning}), parent_run=run)


def plan_choice(run: Run, base: Source, data: Stage, method: str, choice: Choice, budget: int) -> tuple[Plan, Run]:
    """Return (the plan of a choice: pruned, recovered, quantized, evaluated; the run that makes it).

    budget: bytes; it is in the name, so that choices for another budget are other settings.
    """
    removed = [layer for layer, bits in enumerate(choice) if bits == REMOVED]
    pruned_run = with_pruning(run, len(removed), removed)
    recovered = recover.stage(pruned_run, prune.stage(pruned_run, base), data)
    model = mixed.stage(pruned_run, recovered, data, [bits for bits in choice if bits != REMOVED])
    kind = ("mixed", 0) if isinstance(model, Stage) and model.kind == "mixed" else ("none", WHOLE)
    wanted = run.config.recover
    recovery = recovery_label(wanted.train, wanted.objective, wanted.fraction)
    setting = Setting(len(removed), recovery, *kind, name=f"{method} in {size(budget)}")
    return Plan(setting, model, None, evaluate.stage(pruned_run, model, data), ()), pruned_run


def build(run: Run, base: Source, data: Stage, named: Mapping[str, Choice], budget: int) -> list[BuiltChoice]:
    """Build and evaluate choices; one that fails keeps its reason, and the others continue."""
    built = []
    for method, choice in named.items():
        failure = None
        plan, pruned_run = plan_choice(run, base, data, method, choice, budget)
        try:
            pruned_run.make(plan.evaluation)
        except (ValueError, RuntimeError) as error:
            failure = str(error)
            LOG.warning(f"joint: {method} failed: {failure}")
        built.append(BuiltChoice(method, choice, plan, failure))
    return built


def make_rows(run: Run, built: Sequence[BuiltChoice], search: AllocationSearch) -> list[JointRow]:
    """Return the choices' rows, compared with the best uniform one; a row that failed has its reason."""
    rows, answers, labels = [], [], []
    for candidate in built:
        measured, model = search.tried[candidate.choice], candidate.plan.model
        row = {
            "method": candidate.method,
            "choice": list(candidate.choice),
            "status": "done" if candidate.failure is None else "failed",
            "reason": candidate.failure,
            "removed_layers": [layer for layer, bits in enumerate(candidate.choice) if bits == REMOVED],
            **{key: measured[key] for key in ("round", "predicted", "kl", "answer_similarity")},
            "estimate_bytes": measured["bytes"],
            **dict.fromkeys((*_METRICS, *_COUNTS, *_PROFILE)),
            **judged_columns(run, candidate.plan.evaluation),
            "checkpoint": run.config.model.path if isinstance(model, Source) else str(run.folder_of(model)),
            "evaluation": candidate.plan.evaluation.name,
        }
        answer_of: dict[str, AnswerRow] = {}
        judged: Mapping[str, int | None] = {}
        if candidate.failure is None:
            facts = run.facts(candidate.plan.evaluation, EvaluateFacts)
            metrics: Mapping = facts["metrics"]
            profile: Mapping = facts["profile"]
            row |= {key: metrics[key] for key in (*_METRICS, *_COUNTS)}
            row |= {key: profile[key] for key in _PROFILE}
            answer_of = ANSWERS.by_sample(run.folder_of(candidate.plan.evaluation))
            if row["is_llm_judge"]:
                judged = judge.labels(run, judge.stage(run, candidate.plan.evaluation))
        rows.append(row)
        answers.append(answer_of)
        labels.append(judged)
    return add_differences(rows, answers, labels)


def add_differences(
    rows: Sequence[dict], answers: Sequence[Mapping[str, AnswerRow]], labels: Sequence[Mapping[str, int | None]]
) -> list[JointRow]:
    """Return the rows, each with its difference from the uniform setting with the best score.

    The score is the judge's where all rows that are done have one, else the baseline. Without a uniform setting, and
    for a row that failed, there is no difference: None.
    """
    done = [number for number, row in enumerate(rows) if row["status"] == "done"]
    kind = "judge" if done and all(rows[number]["judge_pct"] is not None for number in done) else "baseline"
    uniform = [number for number in done if rows[number]["method"].startswith(UNIFORM)]
    no_difference: dict[str, Any] = {
        **differences([{}], {}, 1.0)[0],
        **differences([{}], {}, 1.0, "exact_difference")[0],
    }
    compared = [{**row, "score_kind": kind, "best_uniform": False, **no_difference} for row in rows]
    if not uniform:
        return cast(list[JointRow], compared)
    best = max(uniform, key=lambda number: rows[number][f"{kind}_pct"])
    order = [best, *(number for number in done if number != best)]
    groups = {sample: row["group"] for number in order for sample, row in answers[number].items()}
    baselines = [{sample: row["baseline"] for sample, row in answers[number].items()} for number in order]
    verbatim = [
        {sample: float(row["answer"] == row["reference"]) for sample, row in answers[number].items()}
        for number in order
    ]
    scored = [labels[number] for number in order] if kind == "judge" else baselines
    columns = zip(
        differences(scored, groups, TOP_LABEL if kind == "judge" else 1.0),
        differences(verbatim, groups, 1.0, "exact_difference"),
        strict=True,
    )
    for number, (difference, exact) in zip(order, columns, strict=True):
        compared[number] |= {"best_uniform": number == best, **difference, **exact}
    return cast(list[JointRow], compared)
