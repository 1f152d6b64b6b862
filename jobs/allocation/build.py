"""What a choice per layer is truly worth: its checkpoint is built, recovered, evaluated, and compared with others."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from actors.judge.verdict import TOP_LABEL
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
class Built:
    """A choice under its name, what it is made of, and why it could not be made or evaluated (None: it was)."""

    method: str
    choice: Choice
    plan: Plan
    failure: str | None


def pruning(run: Run, layers: int, order: Sequence[int] | None = None) -> Run:
    """Return the same run with another number of layers, or these layers, to remove."""
    pruning = run.config.prune.model_copy(update={"layers": layers, "order": None if order is None else list(order)})
    return Run(run.config.model_copy(update={"prune": pruning}), parent_run=run)


def planned(run: Run, base: Source, data: Stage, method: str, choice: Choice, budget: int) -> tuple[Plan, Run]:
    """Return (the checkpoint of a choice: pruned, recovered, rounded; and its evaluation; the run that makes them).

    budget: bytes; it is in the name, so that choices for another one are other settings.
    """
    removed = [layer for layer, bits in enumerate(choice) if bits == REMOVED]
    pruned_run = pruning(run, len(removed), removed)
    recovered = recover.stage(pruned_run, prune.stage(pruned_run, base), data)
    model = mixed.stage(pruned_run, recovered, data, [bits for bits in choice if bits != REMOVED])
    kind = ("mixed", 0) if isinstance(model, Stage) and model.kind == "mixed" else ("none", WHOLE)
    setting = Setting(len(removed), run.config.recover.method, *kind, name=f"{method} in {size(budget)}")
    return Plan(setting, model, None, evaluate.stage(pruned_run, model, data), ()), pruned_run


def build(run: Run, base: Source, data: Stage, named: Mapping[str, Choice], budget: int) -> list[Built]:
    """Build and evaluate choices; one that fails says why, and the others go on."""
    built = []
    for method, choice in named.items():
        failure = None
        plan, pruned_run = planned(run, base, data, method, choice, budget)
        try:
            pruned_run.make(plan.evaluation)
        except (ValueError, RuntimeError) as error:
            failure = str(error)
            LOG.warning(f"joint: {method} failed: {failure}")
        built.append(Built(method, choice, plan, failure))
    return built


def make_rows(run: Run, built: Sequence[Built], search: AllocationSearch) -> list[JointRow]:
    """Return the rows of choices that were tried, compared with the best uniform one; a failed one has its reason."""
    rows, answers, labels = [], [], []
    for choice_built in built:
        measured, model = search.tried[choice_built.choice], choice_built.plan.model
        row = {
            "method": choice_built.method,
            "choice": list(choice_built.choice),
            "status": "done" if choice_built.failure is None else "failed",
            "reason": choice_built.failure,
            "removed_layers": [layer for layer, bits in enumerate(choice_built.choice) if bits == REMOVED],
            **{key: measured[key] for key in ("round", "predicted", "kl", "answer_similarity")},
            "estimate_bytes": measured["bytes"],
            **dict.fromkeys((*_METRICS, *_COUNTS, *_PROFILE)),
            **judged_columns(run, choice_built.plan.evaluation),
            "checkpoint": run.config.model.path if isinstance(model, Source) else str(run.folder_of(model)),
            "evaluation": choice_built.plan.evaluation.name,
        }
        given: dict[str, AnswerRow] = {}
        judged: Mapping[str, int | None] = {}
        if choice_built.failure is None:
            facts = run.facts(choice_built.plan.evaluation, EvaluateFacts)
            metrics: Mapping = facts["metrics"]
            profile: Mapping = facts["profile"]
            row |= {key: metrics[key] for key in (*_METRICS, *_COUNTS)}
            row |= {key: profile[key] for key in _PROFILE}
            given = ANSWERS.by_sample(run.folder_of(choice_built.plan.evaluation))
            if row["is_llm_judge"]:
                judged = judge.labels(run, judge.stage(run, choice_built.plan.evaluation))
        rows.append(row)
        answers.append(given)
        labels.append(judged)
    return add_differences(rows, answers, labels)


def add_differences(
    rows: Sequence[dict], answers: Sequence[Mapping[str, AnswerRow]], labels: Sequence[Mapping[str, int | None]]
) -> list[JointRow]:
    """Return the rows, each with its difference from the uniform setting of the best score.

    The score is the judge's where all rows that are done have one, else the baseline. Without a uniform setting, and
    for a row that failed, there is no difference: None.
    """
    done = [number for number, row in enumerate(rows) if row["status"] == "done"]
    kind = "judge" if done and all(rows[number]["judge_pct"] is not None for number in done) else "baseline"
    uniform = [number for number in done if rows[number]["method"].startswith(UNIFORM)]
    nothing: dict[str, Any] = {**differences([{}], {}, 1.0)[0], **differences([{}], {}, 1.0, "exact_difference")[0]}
    compared = [{**row, "score_kind": kind, "best_uniform": False, **nothing} for row in rows]
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
