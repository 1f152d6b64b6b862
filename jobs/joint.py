"""Choose for every decoder layer whether to remove it, or else its bits, under one memory budget.

    python -m jobs.joint --config configs/derm-tiny.yaml --prune.layers 3
    python -m jobs.joint --config configs/mine.yaml --joint.budget_gib 4.0 --joint.options '[0, 3, 4, 8, 16]'

Every option of every layer is measured alone. An integer program then finds the choices with the least summed damage,
which are measured as a whole; later rounds search near the best one (jobs.allocation.choice). The best few are
built (pruned, recovered, quantized), evaluated, judged if judge.engine is set, and compared with uniform settings
within the budget: as many at each number of bits, those that remove the fewest layers (at most half of all, or as many
as search.depths has), quantized and recovered in the same way. A choice that fails is a row with its reason. All rows
go to run_dir/joint.json; the choices that were built also join the table, the answer and the report of jobs.search.

Memory is estimated as in jobs.search: weights, key/value cache, working memory with an image in the prompt, model.dtype
for weights that are not quantized, CUDA contexts. Several GPUs are counted together, while search.budget.memory_gib
limits the fullest one. A reader that unpacks the weights, as transformers does, takes more memory, and as much time per
token as for weights that were never quantized.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import cast

from actors.maths.ranks import compute_spearman_rho
from jobs import ablate, judge, prepare, prune
from jobs.allocation import mixed
from jobs.allocation.build import UNIFORM, build, make_rows, with_pruning
from jobs.allocation.choice import REMOVED, WHOLE, AllocationSearch, Choice, Memory, format_choice
from jobs.core.command import main
from jobs.core.facts import AblateFacts, SelectFacts
from jobs.core.run import Run
from jobs.core.stage import Source, Stage
from jobs.core.text import GIB, align, size
from jobs.judging.asking import check_judge
from jobs.judging.tables import flag
from jobs.ranking import calibration, select
from jobs.ranking.measurements import ChoiceMeasurements, NothingRanked
from jobs.searching.budget import judge_lines
from jobs.searching.joint_table import Additivity, JointFile, write_joint
from jobs.searching.log import MEASURED_FOR, write_log
from jobs.searching.memory import context_bytes, device_gib, shapes_of, size_setting
from jobs.searching.rows import joint_rows, write_rows
from jobs.searching.stages import order_stages

LOG = logging.getLogger("jobs")


def memory_of(run: Run) -> Memory:
    """Return what estimates the memory of choices for the config's model."""
    shapes = shapes_of(run)
    setup = size_setting(run.config, "mixed", (WHOLE,) * len(shapes.layers))
    return Memory(shapes, setup, tuple(run.config.joint.options), setup.devices * context_bytes(run.config))


def removal_order(run: Run, base: Source, data: Stage, most: int) -> tuple[list[list[int]], list[Stage]]:
    """Return (the layers that uniform settings remove, for each count up to `most`; the stages that chose them)."""
    order = run.config.prune.order
    if order is not None:
        return [sorted(order[:count]) for count in range(min(most, len(order)) + 1)], []
    scores = ablate.stage(run, base, data)
    run.make(scores)
    sets: list[list[int]] = [[]]
    stages = [scores]
    for count in range(1, min(most, len(run.facts(scores, AblateFacts)["order"])) + 1):
        pruned_run = with_pruning(run, count)
        if run.config.prune.search == "one_shot":
            sets.append(list(select.one_shot(pruned_run, scores)))
            continue
        selection = select.stage(pruned_run, base, data, scores)
        try:
            pruned_run.make(selection)
        except NothingRanked:  # with so many layers removed no loss is finite, nor with more
            if count == 1:
                raise
            break
        stages.append(selection)
        sets.append(run.facts(selection, SelectFacts)["removed"])
    return sets, stages


def uniform_choice(removed: Sequence[int], bits: int, layers: int) -> Choice:
    """Return the choice that removes these layers and gives the others the same bits."""
    return tuple(REMOVED if layer in removed else bits for layer in range(layers))


def budget_of(run: Run, memory: Memory, sets: Sequence[Sequence[int]]) -> int:
    """Return the budget in bytes. ValueError: prune.layers, which decides it, is more than may be removed."""
    wanted, layers = run.config.joint.budget_gib, len(memory.shapes.layers)
    if wanted is not None:
        return int(wanted * GIB)
    if run.config.prune.layers >= len(sets):
        raise ValueError(
            f"The budget is that of prune.layers {run.config.prune.layers} at 4 bits, but only {len(sets) - 1} layers "
            "may be removed: set joint.budget_gib, or a smaller prune.layers."
        )
    return memory.total(uniform_choice(sets[run.config.prune.layers], 4, layers))


def uniform_choices(memory: Memory, sets: Sequence[Sequence[int]], budget: int, count: int) -> list[Choice]:
    """Return, for each number of bits, the `count` uniform choices with the fewest layers removed within the budget."""
    layers, choices = len(memory.shapes.layers), []
    for bits in memory.options:
        if bits == REMOVED:
            continue
        fitting = (uniform_choice(removed, bits, layers) for removed in sets)
        choices += [choice for choice in fitting if memory.total(choice) <= budget][:count]
    return choices


def search(
    run: Run, base: Source, data: Stage, memory: Memory, budget: int, uniform: Sequence[Choice], before: Sequence[Stage]
) -> AllocationSearch:
    """Search on the calibration questions. before: the stages that were made for it, which go to the log."""
    config = run.config
    rounded = mixed.options_stage(run, base, data, [bits for bits in memory.options if bits not in (REMOVED, WHOLE)])
    critic = {
        "max_new_tokens": config.generation.max_new_tokens,
        "embedder": config.ablate.embedder,
        "seed": config.seed,
        "options": run.make(rounded),
    }
    samples = calibration.calibration_samples(run, data)
    started = time.time()
    with run.workers.replicas(run.model_spec(base), "actors.choices:ChoiceCritic", **critic) as pool:
        measured = ChoiceMeasurements(run, pool, base, data, samples, rounded)
        allocation = AllocationSearch(measured, memory, budget, config.joint)
        allocation.run(uniform)
        allocation.measure_both([*named_choices(allocation, uniform, config.joint.candidates).values()])
    timing = {"started": started, "seconds": round(time.time() - started, 3), "gpu_seconds": round(pool.gpu_seconds, 3)}
    write_log(
        run,
        {
            "event": MEASURED_FOR,
            "name": "joint",
            **timing,
            "stages": [stage.name for stage in order_stages([rounded, *before])],
        },
    )
    return allocation


def additivity(rows: Sequence[Mapping], damage: str) -> Additivity:
    """Compare predicted with measured damage over the first round's choices (in the damage's unit)."""
    first = [row for row in rows if row["round"] == 1 and row["predicted"] is not None and isfinite(row[damage])]
    pairs = [(row["predicted"], row[damage]) for row in first]
    predicted, measured = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
    rank = compute_spearman_rho(*zip(*pairs, strict=True))
    return {"choices": len(pairs), "mean_predicted": predicted, "mean_measured": measured, "spearman": rank}


def format_rows(rows: Sequence[Mapping], damage: str, failure: Exception | None = None) -> str:
    """Return the choices that were built as a table for a terminal; failure: the error that ended the judge."""
    score = "judge %" if rows[0]["score_kind"] == "judge" else "baseline %"
    lines = [["method", "predicted", f"measured {damage}", "estimate", "weights", score, "vs best uniform", ""]]
    lines[0].append("bits by layer (- removed)")
    for row in rows:
        done, interval = row["status"] == "done", row["difference_interval_pct"]
        lines.append(
            [
                row["method"],
                "" if row["predicted"] is None else f"{row['predicted']:.4f}",
                f"{row[damage]:.4f}",
                size(row["estimate_bytes"]),
                size(row["weight_bytes"]) if done else "",
                f"{row[row['score_kind'] + '_pct']:.1f}{flag(row)}" if done else "failed",
                "" if interval is None else f"{row['difference_pct']:+.1f} [{interval[0]:+.1f}, {interval[1]:+.1f}]",
                "best uniform" if row["best_uniform"] else row["difference_finding"] or "",
                format_choice(row["choice"]),
            ]
        )
    text = align(lines, left=len(lines[0]))
    text += [f"{row['method']} failed: {row['reason']}" for row in rows if row["status"] == "failed"]
    judged = judge_lines({row["method"]: row for row in rows}, failure)
    return "\n".join(text + (judged or ["LLM judge: not run"]))


def check_config(run: Run, memory: Memory) -> None:
    """Check method, package, budget and judge before anything is measured. ValueError: what cannot be used."""
    mixed.check(run)
    if run.config.prune.width < 1:
        raise ValueError("jobs.joint chooses layers and bits of a model of full width: set prune.width to 1.")
    if run.config.judge.engine != "none":
        check_judge(run)
    if run.config.joint.budget_gib is None and REMOVED in memory.options:
        prune.stage(run, run.base_model())  # the budget is that of prune.layers removed: may so many be?
    if run.config.joint.budget_gib is not None:
        check_budget(memory, int(run.config.joint.budget_gib * GIB))


def check_budget(memory: Memory, budget: int) -> None:
    """ValueError: no choice is within the budget (bytes)."""
    least = memory.least
    if memory.total(least) > budget:
        raise ValueError(
            f"The budget is {budget / GIB:.4g} GiB, but the smallest choice of joint.options {list(memory.options)} "
            f"takes {memory.total(least) / GIB:.4g} GiB ({format_choice(least)}): raise joint.budget_gib, or allow "
            "fewer bits."
        )


def named_choices(allocation: AllocationSearch, uniform: Sequence[Choice], candidates: int) -> dict[str, Choice]:
    """Return the choices to build, by name: those of least damage that are not uniform, and all uniform ones."""
    named = {}
    for number, choice in enumerate([each for each in allocation.best if each not in uniform][:candidates], 1):
        bits = set(choice) - {REMOVED}
        named[f"joint {number}" + (f", all {bits.pop()} bit" if len(bits) == 1 else "")] = choice
    return named | {f"{UNIFORM} {max(choice)} bit, {choice.count(REMOVED)} out": choice for choice in uniform}


def job(run: Run) -> None:
    """Search, build the best few, evaluate and compare them, and write the rows."""
    memory = memory_of(run)
    check_config(run, memory)
    base, data, joint = run.base_model(), prepare.stage(run), run.config.joint
    layers = len(memory.shapes.layers)
    most = min(layers - 1, max(layers // 2, run.config.prune.layers, *run.config.search.depths))
    sets, before = removal_order(run, base, data, most) if REMOVED in memory.options else ([[]], [])
    budget = budget_of(run, memory, sets)
    check_budget(memory, budget)
    uniform = uniform_choices(memory, sets, budget, joint.candidates)
    LOG.info(
        f"joint: budget {size(budget)}; uniform settings within it: {', '.join(map(format_choice, uniform)) or 'none'}",
    )
    allocation = search(run, base, data, memory, budget, uniform, before)
    built = build(run, base, data, named_choices(allocation, uniform, joint.candidates), budget)
    evaluated = [candidate.plan.evaluation for candidate in built if candidate.failure is None]
    failure = judge.judge_or_error(run, evaluated) if run.config.judge.engine != "none" else None
    for candidate in built:
        if candidate.failure is None:
            judge.refresh_card(run, candidate.plan.model, candidate.plan.evaluation)
    rows = make_rows(run, built, allocation)
    sizes = [device_gib(run.config, memory.shapes, "mixed", candidate.choice) for candidate in built]
    write_rows(
        run, joint_rows(run, [candidate.plan for candidate in built], sizes, [candidate.failure for candidate in built])
    )
    sums = additivity(list(allocation.tried.values()), joint.damage)
    content = {
        "budget_bytes": budget,
        "damage": joint.damage,
        **calibration.calibration_settings(run),
        "additivity": sums,
        "candidates": rows,
        "singles": allocation.singles,
        "tried": list(allocation.tried.values()),
    }
    path = write_joint(run.folder, cast(JointFile, content))
    print(format_rows(rows, joint.damage, failure))
    print(
        f"Predicted {joint.damage} of the first round's {sums['choices']} choices: {sums['mean_predicted']:.4f} on "
        f"average, measured {sums['mean_measured']:.4f}; rank correlation {sums['spearman']}",
        flush=True,
    )
    LOG.info(f"joint: rows are in {path}")
    if all(candidate.failure is not None for candidate in built):
        raise RuntimeError(f"All {len(built)} choices failed; the first: {built[0].failure}")
    if failure is not None:
        raise failure


if __name__ == "__main__":
    main(__doc__, job)
