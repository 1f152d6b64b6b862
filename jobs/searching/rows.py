"""The table of a search: one row per setting, made from artifacts, so that no interruption changes it."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from actors.maths.latency import cover_time
from cluster.artifacts import digest
from jobs import judge
from jobs.core.facts import EvaluateFacts, JudgeFacts, PruneFacts
from jobs.core.run import Run
from jobs.core.stage import Stage
from jobs.core.text import GIB
from jobs.judging.tables import NOT_JUDGED
from jobs.scoring.rows import ANSWERS, AnswerRow
from jobs.searching.log import MEASURED_FOR, read_log
from jobs.searching.memory import device_gib, shapes_of
from jobs.searching.sizing import removals
from jobs.searching.space import config_of, format_command, format_single_command, to_columns
from jobs.searching.stages import SEARCH, Plan
from jobs.searching.table import ROWS, SearchRow

LOG = logging.getLogger("jobs.searching")

PACKED = "estimate, packed"  # memory_kind of a joint choice on a CPU, whose weights transformers unpacks
_JUDGED = (*NOT_JUDGED, "judge_identity", "judgement")  # judge_identity: equal where the same judge scored
# Read from clocks and from the system: equal in two runs only where the second reuses the first one's evaluation.
MEASURED = (
    "ms_per_token",
    "ms_per_token_p5_p95",
    "first_token_ms",
    "process_peak_gib",
    "seconds_alone",
    "gpu_hours_alone",
)
_HEADLINE = ("score_pct", "score_interval_pct", "score_kind")  # added when the table is written
_COLUMNS = (
    *(*_JUDGED, "baseline_pct", "baseline_interval_pct"),
    *("images", "answers", "unanswered", "exact_pct", "name_accuracy", "name_accuracy_interval"),
    *("params", "weight_bytes", "memory_gib", "memory_kind", "process_peak_gib"),
    *("ms_per_token", "ms_per_token_p5_p95", "first_token_ms", "device", "threads"),
)


def estimates(run: Run, plans: Sequence[Plan]) -> list[float]:
    """Return what every setting takes on its device (GiB), from the model's config alone; a GPU's context included."""
    from actors.estimate import uniform

    config = run.config
    widths = {plan.setting.width: plan.setting for plan in plans}
    shapes = {width: shapes_of(Run(config_of(config, each), parent_run=run)) for width, each in widths.items()}
    windows = [layer.window for layer in next(iter(shapes.values())).layers]
    depths = [plan.setting.depth for plan in plans]
    counted = config.model_copy(update={"estimate": config.estimate.model_copy(update={"removed": depths})})
    sizes = []
    for plan, (removed, _) in zip(plans, removals(counted, windows), strict=True):
        bits = uniform(len(windows), removed, plan.setting.bits)
        sizes.append(device_gib(config, shapes[plan.setting.width], plan.setting.quantizer, bits))
    return sizes


def rows_of(
    run: Run, plans: Sequence[Plan], estimated: Sequence[float], failures: Mapping, dominated: Mapping
) -> list[SearchRow]:
    """Return a row per setting, in the order of the space.

    failures: why a setting's stages could not be made, by key; dominated: by which setting in screening, and by how
    much, by key. status: done (evaluated, whatever the budget now is), over budget, screened out, failed, or open (not
    finished). seconds_alone, gpu_hours_alone: of the setting's stages as far as they are made, whoever made them; its
    screen is not among them. conditions: hash of data, base model and way of evaluation; rows with the same compare.
    """
    budget = run.config.search.budget.memory_gib
    rows = []
    for plan, size in zip(plans, estimated, strict=True):
        end = None
        if budget is not None and size > budget:
            end = "over budget", f"the estimate of {size:.4g} GiB is above {budget:g} GiB"
        elif failure := failures.get(plan.setting.key):
            end = "failed", failure
        elif loss := dominated.get(plan.setting.key):
            words = "{to} takes no more and is better by {pct:.1f} [{low:.1f}, {high:.1f}]"
            end = "screened out", words.format(**loss)
        rows.append(_row(run, plan, size, end, "uniform", format_single_command(plan.setting, run.config.run_dir)))
    return rows


def joint_rows(
    run: Run, plans: Sequence[Plan], estimated: Sequence[float], failures: Sequence[str | None]
) -> list[SearchRow]:
    """Return a row like those of the search for every choice that jobs.joint built, or failed to build."""
    ends = [None if failure is None else ("failed", failure) for failure in failures]
    command = format_command()
    return [_row(run, *columns, "joint", command) for columns in zip(plans, estimated, ends, strict=True)]


def _row(
    run: Run, plan: Plan, estimate_gib: float, end: tuple[str, str] | None, method: str, command: str
) -> SearchRow:
    evaluated = run.store.find(plan.evaluation.name)
    status, reason = ("done", None) if evaluated else end or ("open", None)
    finished = [stage for stage in plan.chain if run.store.find(stage.name)]
    pruned = [stage for stage in finished if stage.kind == "prune"]
    model = plan.model
    row = {
        "method": method,
        **to_columns(plan.setting),
        "status": status,
        "reason": reason,
        "estimate_gib": round(estimate_gib, 9),
        **_screen(run, plan),
        **_scores(run, plan, estimate_gib, status == "done"),
        "removed_layers": run.facts(pruned[0], PruneFacts)["removed"] if pruned else [],
        "simulated": model in finished and bool(run.store.manifest(model.name).get("simulated")),
        "unpacked": _unpacked(plan),
        "seconds_alone": round(sum(run.facts(stage)["seconds"] for stage in finished), 1),
        "gpu_hours_alone": _gpu_hours(run, finished),
        "checkpoint": f"artifacts/{model.name}" if isinstance(model, Stage) else run.config.model.path,
        "evaluation": plan.evaluation.name,
        "screen": plan.screen.name if plan.screen else None,
        "artifacts": [stage.name for stage in plan.chain],
        "conditions": digest(
            [
                run.base_model().name,
                plan.evaluation.version,
                plan.evaluation.settings,
                [parent.name for parent in plan.evaluation.parents[1:]],
            ]
        ),
        "command": command,
        **dict.fromkeys(_HEADLINE),
    }
    return cast(SearchRow, row)


def _screen(run: Run, plan: Plan) -> dict:
    """Return the scores of the screening evaluation, None where there was none."""
    keys = ("screen_pct", "screen_interval_pct", "screen_images")
    if plan.screen is None or run.store.find(plan.screen.name) is None:
        return dict.fromkeys(keys)
    metrics = run.facts(plan.screen, EvaluateFacts)["metrics"]
    return dict(zip(keys, (metrics["baseline_pct"], metrics["baseline_interval_pct"], metrics["images"]), strict=True))


def _unpacked(plan: Plan) -> bool:
    """Tell whether transformers unpacks the checkpoint's rounded weights for good when it loads them."""
    return isinstance(plan.model, Stage) and plan.model.kind == "mixed"


def _scores(run: Run, plan: Plan, estimate_gib: float, done: bool) -> dict:
    """Return the columns of the evaluation, and of the judge, if there is one."""
    if not done:
        return dict.fromkeys(_COLUMNS)
    facts = run.facts(plan.evaluation, EvaluateFacts)
    values = {
        **facts["metrics"],
        **facts["profile"],
        **judged_columns(run, plan.evaluation),
        **_memory(facts["profile"], estimate_gib, _unpacked(plan)),
        "process_peak_gib": facts["profile"]["peak_memory_bytes"] / GIB,
    }
    return {name: values[name] for name in _COLUMNS}


def _memory(profile: Mapping, estimate_gib: float, unpacked: bool) -> dict:
    """Return the memory of a row: on a GPU the peak that the driver saw, of several that of the fullest.

    On a CPU, where a process is mostly interpreter, it is the estimate.
    """
    peaks = profile["steady_peak_bytes"]
    for name, kind in (("fullest", "GPU, driver, the fullest"), ("driver", "GPU, driver")):
        if name in peaks:
            return {"memory_gib": peaks[name] / GIB, "memory_kind": kind}
    return {"memory_gib": round(estimate_gib, 9), "memory_kind": PACKED if unpacked else "estimate"}


def judged_columns(run: Run, evaluation: Stage) -> dict:
    """Return what the judge says of an evaluation, as far as it is judged."""
    judgement = judge.stage(run, evaluation) if run.config.judge.engine != "none" else None
    if judgement is None or run.store.find(judgement.name) is None:
        return {**dict.fromkeys(_JUDGED), **NOT_JUDGED}
    return {
        **judge.row(run, judgement),
        "judge_identity": digest(run.facts(judgement, JudgeFacts)["identity"]),
        "judgement": judgement.name,
    }


def _headlines(rows: Sequence[SearchRow]) -> list[SearchRow]:
    """Add the score that settings are compared by: the judge's percentage if all that it judged have one.

    What was evaluated without the judge then has none. The scores of several judges do not compare.
    """
    judged = [row for row in rows if row["status"] == "done" and row["is_llm_judge"]]
    alike = len({row["judge_identity"] for row in judged}) == 1
    kind = "judge" if alike and all(row["judge_pct"] is not None for row in judged) else "baseline"
    headline = {"score_pct": f"{kind}_pct", "score_interval_pct": f"{kind}_interval_pct"}
    return [
        cast(SearchRow, {**row, **{name: row.get(source) for name, source in headline.items()}, "score_kind": kind})
        for row in rows
    ]


def _gpu_hours(run: Run, stages: Sequence[Stage]) -> float | None:
    """Return the GPU-hours of stages; None if one has no record of them."""
    noted = [facts["gpu_seconds"] for facts in [run.facts(stage) for stage in stages] if "gpu_seconds" in facts]
    return round(sum(noted) / 3600, 6) if len(noted) == len(stages) else None


def totals(run: Run, rows: Sequence[SearchRow]) -> dict:
    """Return the cost of the rows' stages, screens included: shared, and apart, as if each row made its own.

    {stages, seconds, seconds_apart, gpu_hours, gpu_hours_apart (None if unknown), busy_seconds: during which at least
    one stage was being made, by the log}. A setting that was screened out counts apart without its missing evaluation.
    The measurements of jobs.joint, and the stages made for them, count once in both.
    """
    log = read_log(run)
    measured = [line for line in log if line["event"] == MEASURED_FOR]
    stages_of_rows = {
        name for row in rows for name in (*row["artifacts"], row["screen"]) if name and run.store.find(name)
    }
    others = {name for line in measured for name in line["stages"] if run.store.find(name)} - stages_of_rows
    facts, more = ([run.store.manifest(name) for name in names] for names in (stages_of_rows, others))
    seconds = sum(entry["seconds"] for entry in (*more, *measured))
    gpu: list[Any] = [row["gpu_hours_alone"] for row in rows]
    is_known = None not in gpu and all("gpu_seconds" in entry for entry in (*facts, *more))
    gpu_seconds = sum(entry["gpu_seconds"] for entry in (*more, *measured)) if is_known else 0.0
    return {
        "stages": len(stages_of_rows | others),
        "seconds": sum(entry["seconds"] for entry in facts) + seconds,
        "seconds_apart": sum(row["seconds_alone"] for row in rows) + seconds,
        "gpu_hours": (sum(entry["gpu_seconds"] for entry in facts) + gpu_seconds) / 3600 if is_known else None,
        "gpu_hours_apart": sum(gpu) + gpu_seconds / 3600 if is_known else None,
        "busy_seconds": cover_time([(line["started"], line["seconds"]) for line in log]),
    }


def write_rows(run: Run, rows: Sequence[SearchRow]) -> Path:
    """Write the rows to run_dir/search/rows.json, atomically, the uniform ones first; rows of other settings stay.

    A row that was judged stays judged. Unfinished rows of settings that are no longer in the space are removed. So are
    rows of other data, another base model or another evaluation, which do not compare with these; their artifacts are
    kept, so that the search that made them writes them again.
    """
    folder = run.folder / SEARCH
    folder.mkdir(parents=True, exist_ok=True)
    before, conditions = read_rows(run), {row["conditions"] for row in rows}
    alike = [row for row in before if not rows or row.get("conditions") in conditions]
    if len(alike) < len(before):
        LOG.warning(
            f"search: {len(before) - len(alike)} rows of other data, another model or another evaluation leave the "
            "table. The search that made them writes them again",
        )
    methods = {row["method"] for row in rows}
    rows_before = {_identity(row): row for row in alike}
    merged = [_with_verdict(row, rows_before.pop(_identity(row), None)) for row in rows]
    others = [row for row in rows_before.values() if row["status"] != "open" or row["method"] not in methods]
    everything = sorted([*merged, *others], key=lambda row: row["method"] != "uniform")
    return ROWS.write(folder, _headlines(everything))


def _identity(row: Mapping) -> tuple:
    return row["method"], row["depth"], row["recovery"], row["quantizer"], row["bits"], row["setting"]


def _with_verdict(row: SearchRow, before: SearchRow | None) -> SearchRow:
    """Return a row with the judge's score that it had before, if it has none now and is of the same evaluation."""
    if before is None or row["is_llm_judge"] or row["evaluation"] != before["evaluation"]:
        return row
    if not before["is_llm_judge"]:
        return row
    return cast(SearchRow, {**row, **{key: value for key, value in before.items() if key in _JUDGED}})


def read_rows(run: Run) -> list[SearchRow]:
    """Return the rows that were recorded; none if there was no search yet. Rows of older code are left out."""
    path = run.folder / SEARCH / ROWS
    recorded = ROWS.read(path.parent) if path.is_file() else []
    rows = [row for row in recorded if row.keys() >= SearchRow.__required_keys__]
    if len(rows) < len(recorded):
        LOG.warning(
            f"search: {len(recorded) - len(rows)} rows of {path} are left out: older code wrote them, without some "
            "columns. The search that made them writes them again, and makes no stage twice",
        )
    return rows


def answers(run: Run, evaluation: str) -> dict[str, AnswerRow]:
    """Return the answers of an evaluation by sample_id."""
    return ANSWERS.by_sample(run.store.root / evaluation)
