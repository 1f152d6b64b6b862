"""Choose for every decoder layer whether it is removed, and else its bits, under one memory budget.

    python -m jobs.joint --config configs/derm-tiny.yaml --prune.layers 3
    python -m jobs.joint --config configs/mine.yaml --joint.budget_gib 4.0 --joint.options '[0, 3, 4, 8, 16]'

Every option of every layer is measured alone, an integer program finds the choices of least summed damage, they are
measured as a whole, and again around the best (jobs.joint_choice). The best few are built (removal, recovery,
rounding), evaluated, and compared with the best of the uniform settings that the budget allows: as few layers removed
(at most half) as it takes at 3, 4, 8 or 16 bits, by the same rounding and with the same recovery. All rows go to
run_dir/joint.json; those of what was built to the table of jobs.search, too, whose answer and report know them.

The budget is what actors.estimate says, as jobs.search counts: weights, keys and values, working memory with an image
in the prompt, model.dtype for what is not rounded; on GPUs their contexts. A reader that unpacks the weights, as
transformers does, takes more, and as long for a token as with weights that were never rounded.
"""

import json
from collections.abc import Sequence

from scipy.stats import spearmanr

from cluster.artifacts import write_text
from jobs import ablate, card, judge, mixed, prepare, select
from jobs.command import main
from jobs.joint_build import UNIFORM, evaluated, pruning
from jobs.joint_choice import REMOVED, WHOLE, Choice, Memory, Search, shown
from jobs.measurements import ChoiceMeasurements
from jobs.run import Run, Source, Stage
from jobs.search_memory import context_bytes, device_gib, setting, shapes_of
from jobs.search_rows import joint_rows, write_rows

ROWS = "joint.json"
GIB, MIB = 2**30, 2**20


def memory_of(run: Run) -> Memory:
    """Return what choices for the config's model take."""
    shapes = shapes_of(run)
    given = setting(run.config, "mixed", (WHOLE,) * len(shapes.layers))
    return Memory(shapes, given, tuple(run.config.joint.options), given.devices * context_bytes(run.config))


def removal_order(run: Run, base: Source, data: Stage, most: int) -> list[list[int]]:
    """Return the layers that uniform settings remove, for each number of them from 0 to at most `most`."""
    order = run.config.prune.order
    if order is not None:
        return [sorted(order[:count]) for count in range(min(most, len(order)) + 1)]
    scores = ablate.stage(run, base, data)
    run.make(scores)
    sets: list[list[int]] = [[]]
    for count in range(1, min(most, len(run.facts(scores)["order"])) + 1):
        own = pruning(run, count)
        if run.config.prune.search == "one_shot":
            sets.append(list(select.one_shot(own, scores)))
            continue
        chosen = select.stage(own, base, data, scores)
        own.make(chosen)
        sets.append(run.facts(chosen)["removed"])
    return sets


def uniform_choice(removed: Sequence[int], bits: int, layers: int) -> Choice:
    """Return the choice that removes these layers and gives the others the same bits."""
    return tuple(REMOVED if layer in removed else bits for layer in range(layers))


def budget_of(run: Run, memory: Memory, sets: Sequence[Sequence[int]]) -> int:
    """Return the budget in bytes; ValueError: it is to be that of more layers than may go."""
    wanted, layers = run.config.joint.budget_gib, len(memory.shapes.layers)
    if wanted is not None:
        return int(wanted * GIB)
    if run.config.prune.layers >= len(sets):
        raise ValueError(
            f"The budget is that of prune.layers {run.config.prune.layers} at 4 bits, but only {len(sets) - 1} layers "
            "may go: set joint.budget_gib, or a smaller prune.layers."
        )
    return memory.total(uniform_choice(sets[run.config.prune.layers], 4, layers))


def uniform_choices(memory: Memory, sets: Sequence[Sequence[int]], budget: int) -> list[Choice]:
    """Return, for each number of bits, the uniform choice with the fewest layers removed that is within the budget."""
    layers, found = len(memory.shapes.layers), []
    for bits in memory.options:
        if bits == REMOVED:
            continue
        fitting = (uniform_choice(removed, bits, layers) for removed in sets)
        found += [choice for choice in fitting if memory.total(choice) <= budget][:1]
    return found


def search(run: Run, base: Source, data: Stage, memory: Memory, budget: int, uniform: Sequence[Choice]) -> Search:
    """Measure on the calibration questions and choose."""
    config = run.config
    rounded = mixed.options_stage(run, base, data, [bits for bits in memory.options if bits not in (REMOVED, WHOLE)])
    critic = {
        "max_new_tokens": config.generation.max_new_tokens,
        "embedder": config.ablate.embedder,
        "seed": config.seed,
        "options": run.make(rounded),
    }
    samples = ablate.calibration_samples(run.make(data), config.ablate.samples, config.seed)
    with run.replicas(base, "actors.choices:ChoiceCritic", **critic) as pool:
        measured = ChoiceMeasurements(run, pool, base, data, samples, rounded)
        found = Search(measured, memory, budget, config.joint)
        found.run(uniform)
        found.measure_both([*found.best[: config.joint.candidates], *uniform])
    return found


def additivity(rows: Sequence[dict], damage: str) -> dict:
    """Say how far predicted damages of the first round's choices are from measured ones (in the damage's unit)."""
    pairs = [(row["predicted"], row[damage]) for row in rows if row["predicted"] is not None and row["round"] == 1]
    predicted, measured = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
    rank = float(spearmanr(*zip(*pairs, strict=True)).statistic) if len(pairs) > 2 else None
    return {"choices": len(pairs), "mean_predicted": predicted, "mean_measured": measured, "spearman": rank}


def table(rows: Sequence[dict], damage: str) -> str:
    """Lay the evaluated choices out for a terminal."""
    lines = [["method", "predicted", f"measured {damage}", "estimate", "weights", "baseline %", "to best uniform", ""]]
    lines[0].append("bits by layer (- removed)")
    for row in rows:
        low, high = row["difference_interval_pct"]
        lines.append(
            [
                row["method"],
                "" if row["predicted"] is None else f"{row['predicted']:.4f}",
                f"{row[damage]:.4f}",
                f"{row['estimate_bytes'] / MIB:.3f} MiB",
                f"{row['weight_bytes'] / MIB:.3f} MiB",
                f"{row['baseline_pct']:.1f}",
                f"{row['difference_pct']:+.1f} [{low:+.1f}, {high:+.1f}]",
                "best uniform" if row["best_uniform"] else row["difference_finding"],
                shown(row["choice"]),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(c.ljust(width) for c, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def job(run: Run) -> None:
    """Search, build the best few, evaluate, compare, and write everything down."""
    base, data, joint = run.base_model(), prepare.stage(run), run.config.joint
    memory = memory_of(run)
    layers = len(memory.shapes.layers)
    most = max(
        layers // 2, run.config.prune.layers
    )  # beyond half of the layers nothing competes, and searches are long
    sets = removal_order(run, base, data, most) if REMOVED in memory.options else [[]]
    budget = budget_of(run, memory, sets)
    uniform = uniform_choices(memory, sets, budget)
    print(
        f"joint: budget {budget / MIB:.3f} MiB; uniform settings within it: {', '.join(map(shown, uniform))}",
        flush=True,
    )
    found = search(run, base, data, memory, budget, uniform)
    named = {f"joint {number}": choice for number, choice in enumerate(found.best[: joint.candidates], 1)}
    least = sorted(uniform, key=lambda choice: found.tried[choice][joint.damage])[: joint.candidates]
    named |= {f"{UNIFORM} {max(choice)} bit": choice for choice in least}
    rows, plans = evaluated(run, base, data, named, found)
    if run.config.judge.engine != "none":
        judge.make_all(run, [plan.evaluation for plan in plans])
    sizes = [device_gib(run.config, memory.shapes, "mixed", tuple(row["choice"])) for row in rows]
    write_rows(run, joint_rows(run, plans, sizes, card.command()))
    added = additivity(list(found.tried.values()), joint.damage)
    content = {
        "budget_bytes": budget,
        "damage": joint.damage,
        "samples": run.config.ablate.samples,
        "additivity": added,
        "candidates": rows,
        "singles": found.singles,
        "tried": list(found.tried.values()),
    }
    path = run.folder / ROWS
    write_text(path, json.dumps(content, indent=1))
    print(table(rows, joint.damage))
    print(
        f"Predicted {joint.damage} of the first round's {added['choices']} choices: {added['mean_predicted']:.4f} on "
        f"average, measured {added['mean_measured']:.4f}; rank correlation {added['spearman']}"
    )
    print(f"joint: rows are in {path}", flush=True)


if __name__ == "__main__":
    main(__doc__, job)
