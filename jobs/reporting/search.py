"""The report of a search: fronts, the answer, a table to sort, the joint choice by layer, what reuse saved."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from cluster.artifacts import write_text
from jobs.config.search import BudgetConfig
from jobs.core.run import Run
from jobs.core.text import GIB, size, with_interval
from jobs.figures.search import Mark, front_figure, layers_figure, retained_figure
from jobs.judging.tables import flag
from jobs.reporting import published
from jobs.reporting.pages import render_page
from jobs.reporting.retained import format_points, retained_points
from jobs.searching.budget import format_answer, judge_remarks, pareto_front, timed_apart
from jobs.searching.joint_table import read_joint
from jobs.searching.rows import answers, totals
from jobs.searching.stages import SEARCH
from jobs.searching.table import Cost, SearchRow

HTML = "report.html"
COSTS: dict[Cost, str] = {"memory_gib": "memory", "ms_per_token": "time"}


def write_report(run: Run, rows: Sequence[SearchRow], resolved: dict, failure: Exception | None = None) -> Path:
    """Write run_dir/search/report.html and its figures as SVG files beside it.

    rows: of the search and of the joint choice; resolved: what jobs.searching.budget.resolve says of the config's
    budget; failure: what ended the judge.
    """
    folder = run.folder / SEARCH
    folder.mkdir(parents=True, exist_ok=True)
    figures = _figures(rows, run.config.search.budget)
    joint = _joint(run)
    if joint is not None:
        figures["layers"] = layers_figure([(row["method"], row["choice"]) for row in joint["candidates"]])
    present = [row for row in rows if run.store.find(row["evaluation"])]
    points = retained_points(present, lambda evaluation: answers(run, evaluation))
    if points:
        lines: dict[str, list[tuple[float, float, float, float]]] = {}
        for point in points:
            lines.setdefault(point.line, []).append((point.removed, point.retained, point.low, point.high))
        figures["retained"] = retained_figure(lines)
        write_text(folder / "retained.md", format_points(points))
    for name, figure in figures.items():
        write_text(folder / f"{name}.svg", '<?xml version="1.0" encoding="utf-8"?>\n' + figure)
    content = {
        "title": f"{run.folder.name}: the best model that fits",
        "model": run.config.model.path,
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "answer": [line.strip() for line in format_answer(resolved, run.config.search.budget).splitlines()],
        "figures": figures,
        "published": published.POINTS,
        "timed_apart": any(map(timed_apart, rows)),
        "rows": [_format_cells(number, row, resolved, rows) for number, row in enumerate(rows, 1)],
        "done": [row for row in rows if row["status"] == "done"],
        "judged": [row for row in rows if row["is_llm_judge"]],
        "remarks": judge_remarks({row["setting"]: row for row in rows}),
        "failure": failure,
        "joint": joint,
        "retained": [point.cells for point in points],
        "spent": _spent(totals(run, rows)),
        "options": json.dumps(run.config.model_dump(mode="json", exclude={"data"}), indent=1),
    }
    write_text(folder / HTML, render_page("search.html.j2", content, "search.js"))
    return folder / HTML


def _figures(rows: Sequence[SearchRow], budget: BudgetConfig) -> dict[str, str]:
    """Return the two fronts by name; none where nothing was evaluated."""
    done = [row for row in rows if row["status"] == "done" and row["score_pct"] is not None]
    if not done:
        return {}
    score = "LLM judge (%)" if done[0]["score_kind"] == "judge" else "baseline score (%), no LLM judge"
    small = max(row["memory_gib"] for row in done) < 0.5
    scale, unit = (1024, "MiB") if small else (1, "GiB")
    figures = {}
    for cost, name in COSTS.items():
        factor = scale if cost == "memory_gib" else 1
        best = pareto_front(rows, cost)
        marks = [
            Mark(number, row[cost] * factor, row["score_pct"], low, high, row["quantizer"], row in best)
            for number, row in enumerate(rows, 1)
            if row in done
            for low, high in [row["score_interval_pct"]]
        ]
        limit = getattr(budget, cost)
        if cost == "memory_gib":
            label = f"memory ({unit}; {done[0]['memory_kind']})"
            theirs, their_unit = [(p.memory_gb, p.score_pct) for p in published.MEMORY], "VRAM (GB)"
        else:
            label = f"ms/token ({done[0]['device']})"
            theirs = [(p.ms_per_token, p.score_pct) for p in published.TIME if p.ms_per_token is not None]
            their_unit = "ms/token (T4)"
        scaled = None if limit is None else limit * factor
        figures[f"front-{name}"] = front_figure(marks, label, score, scaled, theirs, their_unit)
    return figures


def _format_cells(number: int, row: SearchRow, resolved: dict, rows: Sequence[SearchRow]) -> dict:
    """Return a row's cells as text, and what a column is sorted by where that differs."""
    done = row["status"] == "done"
    scored = done and row["score_pct"] is not None
    roles = {"answer": resolved["answer"], "runner-up": resolved["runner_up"]}
    marks = [role for role, other in roles.items() if other is not None and other["setting"] == row["setting"]]
    marks += [f"front of {name}" for cost, name in COSTS.items() if row in pareto_front(rows, cost)]
    return {
        "number": number,
        "setting": row["setting"],
        "status": row["status"],
        "marks": ", ".join(marks),
        "score": _score(row),
        "score_value": row["score_pct"] if scored else None,
        "memory": size(row["memory_gib"] * GIB) if done else f"{size(row['estimate_gib'] * GIB)} (estimate)",
        "memory_value": row["memory_gib"] if done else row["estimate_gib"],
        "ms": f"{row['ms_per_token']:.2f}" if done else "",
        "ms_value": row["ms_per_token"],
        "params": f"{row['params'] / 1e6:,.3f}" if done else "",
        "params_value": row["params"],
        "seconds": f"{row['seconds_alone']:.0f}",
        "seconds_value": row["seconds_alone"],
        "removed": ", ".join(map(str, row["removed_layers"])) or "none",
        "reason": row["reason"],
        "simulated": row["simulated"],
        "unpacked": row["unpacked"],
        "command": row["command"],
        "checkpoint": row["checkpoint"],
    }


def _score(row: SearchRow) -> str:
    if row["status"] != "done":
        return ""
    if row["score_pct"] is None:
        return "not judged"
    return f"{with_interval(row['score_pct'], row['score_interval_pct'])} {flag(row)}".rstrip()


def _joint(run: Run) -> dict | None:
    """Return what jobs.joint recorded; None if there is nothing, or older code wrote it."""
    recorded = read_joint(run.folder)
    if recorded is None:
        return None
    judged = [row for row in recorded["candidates"] if row["is_llm_judge"]]
    return {
        **recorded,
        "judged": judged,
        "remarks": judge_remarks({row["method"]: row for row in recorded["candidates"]}),
    }


def _spent(sums: dict) -> dict:
    """Return seconds and GPU-hours as text, made once and apart, and the share that reuse saved (%)."""
    saved = 100 * (1 - sums["seconds"] / sums["seconds_apart"]) if sums["seconds_apart"] else 0.0
    gpu = sums["gpu_hours"], sums["gpu_hours_apart"]
    return {
        "stages": sums["stages"],
        "seconds": f"{sums['seconds']:,.0f}",
        "seconds_apart": f"{sums['seconds_apart']:,.0f}",
        "saved": f"{saved:.0f}",
        "busy": f"{sums['busy_seconds']:,.0f}",
        "gpu": None if None in gpu or not gpu[1] else [f"{hours:.2f}" for hours in gpu],
    }
