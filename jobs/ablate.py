"""Score every candidate decoder layer: how similar do the answers stay without it? (paper, eq. 2-5)

    python -m jobs.ablate --config configs/derm-tiny.yaml
    ray job submit --working-dir . -- python -m jobs.ablate --config configs/llava-1.5-7b-dermnet.yaml \\
        --data.root /shared/dermnet --run_dir /shared/runs/dermnet

The score of layer b is the mean cosine between the sentence embeddings of the answers with and without it; the
layer with the highest score is missed least and is removed first. --ablate.criterion ranks by another measure, and
--ablate.compare tells how far other criteria agree.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from actors.criteria import CRITERIA, PLUS_FIRST, PLUS_LAST
from actors.maths.losses import Losses, count_apart, rank_losses
from actors.maths.ranks import compute_kendall_tau
from jobs import prepare
from jobs.config.schema import AblateConfig
from jobs.core.command import main
from jobs.core.facts import AblateFacts
from jobs.core.run import Run
from jobs.core.stage import Source, Stage
from jobs.core.text import format_score
from jobs.figures.layers import importance_figure
from jobs.ranking.calibration import calibration_settings, open_measurements
from jobs.ranking.rows import AGREEMENT, SCORES, Agreement, LayerScore

LOG = logging.getLogger("jobs")

FIGURE = "importance.svg"


def stage(run: Run, model: Stage | Source, data: Stage) -> Stage:
    """Return the stage that scores `model`'s layers on calibration questions of the training split."""
    config = run.config.ablate
    settings: dict = {
        **calibration_settings(run),
        "criterion": config.criterion,
        "candidates": config.candidates,
        "dtype": run.config.model.dtype,
    }
    if CRITERIA[config.criterion].measure == "answers":
        settings["embedder"] = run.embedder_identity(config.embedder)
        settings["max_new_tokens"] = run.config.generation.max_new_tokens
    return Stage("ablate", 3, settings, (model, data), lambda r, folder, facts: build(r, model, data, folder, facts))


def comparison_stage(run: Run, model: Stage | Source, data: Stage, scores: Stage) -> Stage:
    """Return the stage that ranks the same layers by other criteria, for the report alone."""
    config = run.config.ablate
    criteria = [criterion for criterion in dict.fromkeys(config.compare) if criterion != config.criterion]
    settings = {"criteria": criteria}
    return Stage(
        "compare",
        2,
        settings,
        (model, data, scores),
        lambda r, f, facts: build_comparison(r, model, data, scores, criteria, f),
    )


def build(run: Run, model: Stage | Source, data: Stage, folder: Path, facts: dict) -> None:
    """Find the candidates, measure their single removals, rank them."""
    config = run.config.ablate
    with open_measurements(run, model, data, [config.criterion]) as (measured, layers):
        outliers: list[int] = []
        if config.candidates == "outliers":
            outliers = measured.outliers([(layer,) for layer in range(layers)])
            LOG.info(f"ablate: layers {outliers} stay: removing one raises perplexity far more than others")
        candidates = candidate_layers(config, layers, outliers)
        if not candidates:
            raise ValueError("No layer may be removed: set ablate.candidates to all or to a list of layers.")
        losses = measured.losses(config.criterion, [(layer,) for layer in candidates])
    scores = score_rows(config.criterion, candidates, losses)
    SCORES.write(folder, scores)
    (folder / FIGURE).write_text(importance_figure(scores, label=CRITERIA[config.criterion].label))
    facts["order"] = [row["layer"] for row in sorted(scores, key=lambda row: row["rank"])]
    facts["outliers"] = outliers
    facts["pairs_apart"], facts["pairs"] = count_apart(losses)
    facts["failed"] = measured.failed


def build_comparison(
    run: Run, model: Stage | Source, data: Stage, scores: Stage, criteria: list[str], folder: Path
) -> None:
    """Rank the scored layers by every other criterion, and write how far the rankings agree."""
    rows = SCORES.read(run.folder_of(scores))
    layers = [row["layer"] for row in rows]
    with open_measurements(run, model, data, criteria) as (measured, _):
        measured.failed.update(run.facts(scores, AblateFacts)["failed"])
        for criterion in criteria:
            rows += score_rows(criterion, layers, measured.losses(criterion, [(layer,) for layer in layers]))
    SCORES.write(folder, rows)
    AGREEMENT.write(folder, agreement_rows(rows))


def candidate_layers(config: AblateConfig, layers: int, outliers: list[int]) -> list[int]:
    """Return the zero-based layers that may be removed; ValueError names one that the model does not have."""
    if isinstance(config.candidates, list):
        for layer in config.candidates:
            if not 0 <= layer < layers:
                raise ValueError(f"ablate.candidates names layer {layer}: the model has layers 0 to {layers - 1}.")
        return sorted(set(config.candidates))
    if config.candidates == "paper":  # blocks 1, 2 and the last, one-based, always stay
        return list(range(2, layers - 1))
    stay = set(outliers)
    if CRITERIA[config.criterion].ends_stay:
        stay |= {*range(PLUS_FIRST), *range(layers - PLUS_LAST, layers)}
    return [layer for layer in range(layers) if layer not in stay]


def score_rows(criterion: str, candidates: list[int], losses: Losses) -> list[LayerScore]:
    """Return one row per layer: loss, score in its label's unit, rank (1 goes first), 95 % intervals of the last two.

    Ties are ranked by layer number, and each one's interval of ranks holds all of them. NaN is the largest loss.
    apart_from_next: the paired interval of the difference to the layer of the next rank excludes 0.
    """
    reading = CRITERIA[criterion]
    ranking = rank_losses(losses, candidates)
    order, means, ranked = ranking.order, losses.means_K.tolist(), losses.ranked_K.tolist()
    rows: list[LayerScore] = []
    for k, layer in enumerate(candidates):
        rank = order.index(k)
        interval = sorted((reading.to_unit(float(ranking.low_K[k])), reading.to_unit(float(ranking.high_K[k]))))
        rows.append(
            {
                "criterion": criterion,
                "layer": layer,
                "loss": ranked[k],
                "score": reading.to_unit(means[k]),
                "low": interval[0],
                "high": interval[1],
                "rank": rank + 1,
                "rank_low": int(ranking.first_K[k]),
                "rank_high": int(ranking.last_K[k]),
                "apart_from_next": rank + 1 < len(order) and bool(ranking.apart_KK[k, order[rank + 1]]),
                "samples": len(losses.values_NK),
            }
        )
    return rows


def agreement_rows(scores: Sequence[LayerScore]) -> list[Agreement]:
    """Return Kendall's tau-b between the losses by every two criteria; None where one of them has equal losses."""
    losses: dict[str, list[float]] = {}
    for row in scores:
        losses.setdefault(row["criterion"], []).append(row["loss"])
    return [
        {"criterion": criterion, "other": other, "tau": compute_kendall_tau(losses[criterion], losses[other])}
        for criterion in losses
        for other in losses
    ]


def format_tau(tau: float | None) -> str:
    """Return Kendall's tau as tables show it."""
    return "undefined" if tau is None else f"{tau:+.2f}"


def job(run: Run) -> None:
    """Score the config's model and print its layers, least important first."""
    model, data, criterion = run.base_model(), prepare.stage(run), run.config.ablate.criterion
    scored = stage(run, model, data)
    folder = Path(run.make(scored))
    print(f"rank  layer  {CRITERIA[criterion].label}, 95 % interval   (first = removed first)")
    for row in sorted(SCORES.read(folder), key=lambda row: row["rank"]):
        interval = f"[{format_score(row['low'])}, {format_score(row['high'])}]"
        ranks = f"rank {row['rank_low']} to {row['rank_high']}"
        print(f"{row['rank']:>4}  {row['layer']:>5}  {format_score(row['score'])}  {interval}  {ranks}")
    facts = run.facts(scored, AblateFacts)
    print(f"{facts['pairs_apart']} of {facts['pairs']} pairs of layers are apart at 95 %")
    if run.config.ablate.compare:
        others = Path(run.make(comparison_stage(run, model, data, scored)))
        for pair in AGREEMENT.read(others):
            if pair["criterion"] == criterion != pair["other"]:
                print(f"Kendall's tau with {pair['other']}: {format_tau(pair['tau'])}")
    sys.stdout.flush()
    LOG.info(f"ablate: scores and figure are in {folder}")


if __name__ == "__main__":
    main(__doc__, job)
