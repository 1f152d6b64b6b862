"""What a choice per layer is truly worth: its checkpoint is built, recovered, evaluated, and compared with others."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.tables import read_table
from jobs import card, evaluate, mixed, prune, recover
from jobs.differences import differences
from jobs.joint_choice import REMOVED, WHOLE, Choice, Search
from jobs.run import Run, Source, Stage
from jobs.search_space import Setting
from jobs.search_stages import Plan

UNIFORM = "uniform"
_METRICS = ("baseline_pct", "baseline_interval_pct", "exact_pct", "name_accuracy", "name_accuracy_interval")


def pruning(run: Run, layers: int, order: Sequence[int] | None = None) -> Run:
    """Return the same run with another number of layers, or these layers, to remove."""
    pruning = run.config.prune.model_copy(update={"layers": layers, "order": None if order is None else list(order)})
    return Run(run.config.model_copy(update={"prune": pruning}), home=run)


def build(run: Run, base: Source, data: Stage, choice: Choice) -> tuple[Stage | Source, Stage, Run]:
    """Return (the checkpoint of a choice: pruned, recovered, rounded; its evaluation; the run that makes them)."""
    removed = [layer for layer, bits in enumerate(choice) if bits == REMOVED]
    own = pruning(run, len(removed), removed)
    healed = recover.stage(own, prune.stage(own, base), data)
    model = mixed.stage(own, healed, data, [bits for bits in choice if bits != REMOVED])
    return model, evaluate.stage(own, model, data), own


def evaluated(
    run: Run, base: Source, data: Stage, named: dict[str, Choice], search: Search
) -> tuple[list[dict], list[Plan]]:
    """Build and evaluate choices that were tried; returns their rows, compared with the best uniform one, and plans."""
    rows, answers, plans = [], [], []
    for method, choice in named.items():
        model, evaluation, own = build(run, base, data, choice)
        own.make(evaluation)
        facts = run.facts(evaluation)
        if isinstance(model, Stage):
            card.refresh(Path(own.make(model)), facts)
        given = read_table(run.store.root / evaluation.name / evaluate.ANSWERS)
        answers.append({row["sample_id"]: row for row in given})
        tried = search.tried[choice]
        gone, rounded = choice.count(REMOVED), isinstance(model, Stage) and model.kind == "mixed"
        kind = ("mixed", 0) if rounded else ("none", WHOLE)
        plans.append(Plan(Setting(gone, run.config.recover.method, *kind, name=method), model, None, evaluation, ()))
        rows.append(
            {
                "method": method,
                "choice": list(choice),
                "removed_layers": [layer for layer, bits in enumerate(choice) if bits == REMOVED],
                **{key: tried[key] for key in ("round", "predicted", "kl", "answer_similarity")},
                "estimate_bytes": tried["bytes"],
                "weight_bytes": facts["profile"]["weight_bytes"],
                "params": facts["profile"]["params"],
                "ms_per_token": facts["profile"]["ms_per_token"],
                "is_llm_judge": False,
                "judge_pct": None,
                **{key: facts["metrics"][key] for key in (*_METRICS, "images", "answers", "unanswered")},
                "checkpoint": own.make(model),
                "evaluation": evaluation.name,
            }
        )
    return compared(rows, answers), plans


def compared(rows: list[dict], answers: list[dict[str, dict]]) -> list[dict]:
    """Return the rows, each with its difference from the uniform setting of the best score."""
    uniform = [number for number, row in enumerate(rows) if row["method"].startswith(UNIFORM)]
    best = max(uniform, key=lambda number: rows[number]["baseline_pct"])
    order = [best, *(number for number in range(len(rows)) if number != best)]
    groups = {sample: row["group"] for each in answers for sample, row in each.items()}
    models = [{sample: row["baseline"] for sample, row in answers[number].items()} for number in order]
    verbatim = [
        {sample: float(row["answer"] == row["reference"]) for sample, row in answers[number].items()}
        for number in order
    ]
    found: dict[int, dict[str, Any]] = {}
    columns = zip(differences(models, groups, 1.0), differences(verbatim, groups, 1.0, "exact_difference"), strict=True)
    for number, (baseline, exact) in zip(order, columns, strict=True):
        found[number] = {**rows[number], "best_uniform": number == best, **baseline, **exact}
    return [found[number] for number in range(len(rows))]
