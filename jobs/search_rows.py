"""The table of a search: one row per setting, made from artifacts, and so the same however often it was stopped."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from cluster.artifacts import write_text
from cluster.tables import read_table
from jobs import evaluate, judge
from jobs.estimate import GIB, removals
from jobs.run import Run, Stage
from jobs.search_memory import device_gib, shapes_of
from jobs.search_space import alone, described
from jobs.search_stages import SEARCH, Plan

ROWS, LOG = "rows.json", "log.jsonl"
# Read from clocks and from the system: equal in two runs only where the second reuses the first one's evaluation.
MEASURED = (
    "ms_per_token",
    "ms_per_token_p5_p95",
    "first_token_ms",
    "process_peak_gib",
    "seconds_alone",
    "gpu_hours_alone",
)
_COLUMNS = (
    *("is_llm_judge", "judge_pct", "judge_interval_pct", "judgement", "baseline_pct", "baseline_interval_pct"),
    *("images", "answers", "unanswered", "exact_pct", "name_accuracy", "name_accuracy_interval"),
    *("params", "weight_bytes", "memory_gib", "memory_kind", "process_peak_gib"),
    *("ms_per_token", "ms_per_token_p5_p95", "first_token_ms", "device", "threads"),
)


def estimates(run: Run, plans: Sequence[Plan]) -> list[float]:
    """Return what every setting takes on its device (GiB), from the model's config alone; a GPU's context included."""
    from actors.estimate import uniform

    config, shapes = run.config, shapes_of(run)
    windows = [layer.window for layer in shapes.layers]
    depths = [plan.setting.depth for plan in plans]
    counted = config.model_copy(update={"estimate": config.estimate.model_copy(update={"removed": depths})})
    found = []
    for plan, (removed, _) in zip(plans, removals(counted, windows), strict=True):
        bits = uniform(len(windows), removed, plan.setting.bits)
        found.append(device_gib(config, shapes, plan.setting.quantizer, bits))
    return found


def rows_of(
    run: Run, plans: Sequence[Plan], estimated: Sequence[float], failures: Mapping, lost: Mapping
) -> list[dict]:
    """Return a row per setting, in the order of the space.

    failures: why a setting's stages could not be made, by key; lost: to which setting one lost in the screen, and by
    how much. status: done, over budget, screened out, failed, or open (not finished). seconds_alone, gpu_hours_alone:
    of the setting's stages as far as they are made, whoever made them; its screen is not among them.
    """
    budget = run.config.search.budget.memory_gib
    rows = []
    for plan, size in zip(plans, estimated, strict=True):
        end = None
        if budget is not None and size > budget:
            end = "over budget", f"the estimate of {size:.4g} GiB is above {budget:g} GiB"
        elif failure := failures.get(plan.setting.key):
            end = "failed", failure
        elif loss := lost.get(plan.setting.key):
            words = "{to} takes no more and is better by {pct:.1f} [{low:.1f}, {high:.1f}]"
            end = "screened out", words.format(**loss)
        rows.append(_row(run, plan, size, end, "uniform", alone(plan.setting)))
    return rows


def joint_rows(run: Run, plans: Sequence[Plan], estimated: Sequence[float], command: str) -> list[dict]:
    """Return a row like those of the search for everything that jobs.joint built and evaluated."""
    return [_row(run, plan, size, None, "joint", command) for plan, size in zip(plans, estimated, strict=True)]


def _row(run: Run, plan: Plan, estimate_gib: float, end: tuple[str, str] | None, method: str, command: str) -> dict:
    evaluated = run.store.find(plan.evaluation.name)
    status, reason = end or ("done" if evaluated else "open", None)
    made = [stage for stage in plan.chain if run.store.find(stage.name)]
    model = plan.model
    return {
        "method": method,
        **described(plan.setting),
        "status": status,
        "reason": reason,
        "estimate_gib": round(estimate_gib, 9),
        **_screen(run, plan),
        **_scores(run, plan, estimate_gib, status == "done"),
        "removed_layers": next((run.facts(stage)["removed"] for stage in made if stage.kind == "prune"), []),
        "simulated": isinstance(model, Stage) and model in made and bool(run.facts(model).get("simulated")),
        "seconds_alone": round(sum(run.facts(stage)["seconds"] for stage in made), 1),
        "gpu_hours_alone": _gpu_hours(run, made),
        "checkpoint": f"artifacts/{model.name}" if isinstance(model, Stage) else run.config.model.path,
        "evaluation": plan.evaluation.name,
        "screen": plan.screen.name if plan.screen else None,
        "artifacts": [stage.name for stage in plan.chain],
        "command": command,
    }


def _screen(run: Run, plan: Plan) -> dict:
    """Return what the cheap evaluation found, None where there was none."""
    keys = ("screen_pct", "screen_interval_pct", "screen_images")
    if plan.screen is None or run.store.find(plan.screen.name) is None:
        return dict.fromkeys(keys)
    found = run.facts(plan.screen)["metrics"]
    return dict(zip(keys, (found["baseline_pct"], found["baseline_interval_pct"], found["images"]), strict=True))


def _scores(run: Run, plan: Plan, estimate_gib: float, done: bool) -> dict:
    """Return what the evaluation found, and the judge, if there is one.

    memory_gib: on a GPU the peak that the driver saw; on a CPU, where that is mostly interpreter, the estimate.
    """
    if not done:
        return dict.fromkeys(_COLUMNS)
    facts = run.facts(plan.evaluation)
    profile = facts["profile"]
    driver = profile["steady_peak_bytes"].get("driver")
    values = {
        **facts["metrics"],
        **profile,
        **_judged(run, plan),
        "memory_gib": round(estimate_gib, 9) if driver is None else driver / GIB,
        "memory_kind": "estimate" if driver is None else "GPU, driver",
        "process_peak_gib": profile["peak_memory_bytes"] / GIB,
    }
    return {name: values[name] for name in _COLUMNS}


def _judged(run: Run, plan: Plan) -> dict:
    unjudged = {"is_llm_judge": False, "judge_pct": None, "judge_interval_pct": None, "judgement": None}
    if run.config.judge.engine == "none":
        return unjudged
    made = judge.stage(run, plan.evaluation)
    return {**judge.row(run, made), "judgement": made.name} if run.store.find(made.name) else unjudged


def _headlines(rows: Sequence[dict]) -> list[dict]:
    """Add the score that settings are compared by: the judge's percentage if all that were evaluated have one."""
    done = [row for row in rows if row["status"] == "done"]
    kind = "judge" if done and all(row["judge_pct"] is not None for row in done) else "baseline"
    headline = {"score_pct": f"{kind}_pct", "score_interval_pct": f"{kind}_interval_pct"}
    return [{**row, **{name: row[source] for name, source in headline.items()}, "score_kind": kind} for row in rows]


def _gpu_hours(run: Run, stages: Sequence[Stage]) -> float | None:
    """Return what the stages held; None if one was made before that was noted."""
    noted = [facts["gpu_seconds"] for facts in map(run.facts, stages) if "gpu_seconds" in facts]
    return round(sum(noted) / 3600, 6) if len(noted) == len(stages) else None


def totals(run: Run, rows: Sequence[dict]) -> dict:
    """Return what the rows' stages took, screens included, and what they would take if each row made its own.

    {stages, seconds, seconds_apart, gpu_hours, gpu_hours_apart (None if unknown), busy_seconds: of the log, in which at
    least one stage was being made}. A setting that was screened out counts apart without its missing evaluation.
    """
    names = {name for row in rows for name in (*row["artifacts"], row["screen"]) if name and run.store.find(name)}
    facts = [run.store.manifest(name) for name in names]
    gpu = [row["gpu_hours_alone"] for row in rows]
    return {
        "stages": len(names),
        "seconds": sum(one["seconds"] for one in facts),
        "seconds_apart": sum(row["seconds_alone"] for row in rows),
        "gpu_hours": sum(one["gpu_seconds"] for one in facts) / 3600 if None not in gpu else None,
        "gpu_hours_apart": sum(gpu) if None not in gpu else None,
        "busy_seconds": busy([(line["started"], line["seconds"]) for line in read_log(run)]),
    }


def busy(spans: Sequence[tuple[float, float]]) -> float:
    """Return the seconds that spans of (start, length) cover together."""
    covered, end = 0.0, float("-inf")
    for start, length in sorted(spans):
        covered += max(0.0, start + length - max(start, end))
        end = max(end, start + length)
    return covered


def read_log(run: Run) -> list[dict]:
    """Return what was made and what failed, in order."""
    path = run.folder / SEARCH / LOG
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def write_rows(run: Run, rows: Sequence[dict]) -> Path:
    """Write the rows to run_dir/search/rows.json, atomically; those of other methods stay, the uniform ones first."""
    path = run.folder / SEARCH / ROWS
    path.parent.mkdir(parents=True, exist_ok=True)
    others = [row for row in read_rows(run) if row["method"] not in {own["method"] for own in rows}]
    everything = sorted([*rows, *others], key=lambda row: row["method"] != "uniform")
    write_text(path, json.dumps(_headlines(everything), indent=1))
    return path


def read_rows(run: Run) -> list[dict]:
    """Return the rows that were recorded; none if there was no search yet."""
    path = run.folder / SEARCH / ROWS
    return json.loads(path.read_text()) if path.is_file() else []


def answers(run: Run, evaluation: str) -> dict[str, dict]:
    """Return the answers of an evaluation by sample_id."""
    return {row["sample_id"]: row for row in read_table(run.store.root / evaluation / evaluate.ANSWERS)}
