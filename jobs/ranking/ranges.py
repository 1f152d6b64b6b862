"""Recorded activation ranges of the model's decoder (paper, figure 4), as an artifact that only the report reads."""

from collections.abc import Sequence
from pathlib import Path

from jobs.core.run import Run
from jobs.core.stage import Source, Stage
from jobs.figures.layers import ranges_figure
from jobs.ranking.calibration import calibration_samples, calibration_settings
from jobs.ranking.rows import RANGES, RangeRow

FIGURE = "ranges.svg"
SHOWN = 10


def stage(run: Run, model: Stage | Source, data: Stage) -> Stage:
    """Return the stage that records the ranges on the ablation's calibration questions."""
    settings = {**calibration_settings(run), "dtype": run.config.model.dtype}
    return Stage("ranges", 1, settings, (model, data), lambda r, folder, facts: build(r, model, data, folder, facts))


def build(run: Run, model: Stage | Source, data: Stage, folder: Path, facts: dict) -> None:
    """Record in one replica; write the table and the figure."""
    samples = calibration_samples(run, data)
    with run.workers.replicas(run.model_spec(model), "actors.ranges:RangeRecorder") as pool:
        rows = pool.call("ranges", samples)
    RANGES.write(folder, rows)
    (folder / FIGURE).write_text(ranges_figure(rows))
    facts["outliers"] = sum(row["outliers"] for row in rows)
    facts["largest_outliers"] = largest_outliers(rows)


def largest_outliers(rows: Sequence[RangeRow]) -> list[dict]:
    """Return the SHOWN outlier channels with the largest ratio to their input's median, by layer, linears and index."""
    channels: list[dict] = [
        {"layer": row["layer"], "projections": row["projections"], "channel": channel, "ratio": ratio}
        for row in rows
        for channel, ratio in zip(row["channel_ids"], row["ratios"], strict=True)
    ]
    return sorted(channels, key=lambda channel_row: -channel_row["ratio"])[:SHOWN]
