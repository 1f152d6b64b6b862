"""Score every candidate decoder layer: how similar do the answers stay without it? (paper, eq. 2-5)

    python -m jobs.ablate --config configs/derm-tiny.yaml
    ray job submit --working-dir . -- python -m jobs.ablate --config configs/llava-1.5-7b-dermnet.yaml \\
        --data.root /shared/dermnet --run_dir /shared/runs/dermnet

The score of layer b is the mean cosine between the sentence embeddings of the answers with and without it; the
layer with the highest score is missed least and is removed first.
"""

from pathlib import Path

import numpy as np

from actors.maths.statistics import cluster_bootstrap_interval
from actors.specs import Sample
from cluster.artifacts import digest
from cluster.tables import PartTable, read_table, write_table
from jobs import prepare
from jobs.command import main
from jobs.figures import importance_figure
from jobs.progress import Progress
from jobs.run import Run, Source, Stage

SCORES, FAILURES, FIGURE = "scores.parquet", "failures.parquet", "importance.svg"


def stage(run: Run, model: Stage | Source, data: Stage) -> Stage:
    """Return the stage that scores `model`'s layers on calibration questions of the training split."""
    config = run.config
    settings = {
        "samples": config.ablate.samples,
        "candidates": config.ablate.candidates,
        "embedder": run.embedder_identity(config.ablate.embedder),
        "dtype": config.model.dtype,
        "max_new_tokens": config.generation.max_new_tokens,
        "seed": config.seed,
    }
    return Stage(
        "ablate", 1, settings, (model, data), lambda r, folder, facts: build(r, model, data, folder, facts), resume=True
    )


def candidate_layers(candidates: str | list[int], layers: int) -> list[int]:
    """Return the zero-based layers that may go; ValueError names one that the model does not have."""
    if isinstance(candidates, str):  # the paper's rule: blocks 1, 2 and the last, one-based, always stay
        return list(range(layers)) if candidates == "all" else list(range(2, layers - 1))
    for layer in candidates:
        if not 0 <= layer < layers:
            raise ValueError(f"ablate.candidates names layer {layer}: the model has layers 0 to {layers - 1}.")
    return sorted(set(candidates))


def calibration_samples(folder: str, count: int, seed: int) -> list[Sample]:
    """Draw `count` questions from the training split of a data artifact."""
    rows = prepare.conversations(folder, "train")
    picks = np.random.default_rng(seed).permutation(len(rows))[:count]
    return [Sample(rows[i]["sample_id"], rows[i]["image"], rows[i]["question"]) for i in sorted(picks)]


def build(run: Run, model: Stage | Source, data: Stage, folder: Path, facts: dict) -> None:
    """Answer all calibration questions with every single removal, unit by unit, and score the layers."""
    config = run.config.ablate
    samples = calibration_samples(run.make(data), config.samples, run.config.seed)
    embedder = run.embedder(config.embedder)
    with run.replicas(model) as pool:
        candidates = candidate_layers(config.candidates, pool.call("layer_count"))
        if not candidates:
            raise ValueError("No layer may be removed: set ablate.candidates to all or to a list of layers.")
        variants = [(), *((layer,) for layer in candidates)]
        units = {
            digest([s.id for s in part]): part
            for part in (samples[i : i + config.unit] for i in range(0, len(samples), config.unit))
        }
        table = PartTable(folder / "units")
        open_units = {name: part for name, part in units.items() if name not in table.finished()}
        work = [(name, (part, variants, run.config.generation.max_new_tokens)) for name, part in open_units.items()]
        failures = []
        with Progress("ablate", len(units), done=len(units) - len(open_units)) as progress:
            for outcome in pool.map("answers", work):
                if outcome.error:
                    failures.append({"unit": outcome.key, "reason": outcome.error})
                else:
                    table.add(outcome.key, _scored(outcome.value, embedder))
                progress.step(note="units")
    rows = table.rows(units)
    if not rows:
        raise RuntimeError(f"Every unit failed; the first one said: {failures[0]['reason']}")
    for failure in failures:
        print(f"ablate: unit {failure['unit']} failed three times and is left out: {failure['reason']}", flush=True)
    scores = _scores(rows, candidates)
    write_table(folder / SCORES, scores)
    if failures:
        write_table(folder / FAILURES, failures)
    (folder / FIGURE).write_text(importance_figure(scores))
    facts["order"] = [row["layer"] for row in sorted(scores, key=lambda row: (-row["score"], row["layer"]))]
    facts["failed_units"] = len(failures)


def _scored(answers: list[dict], embedder) -> list[dict]:
    """Add every answer's similarity to the whole model's answer to the same question."""
    whole = {row["sample_id"]: row["answer"] for row in answers if not row["removed"]}
    pairs = [(row["answer"], whole[row["sample_id"]]) for row in answers]
    cosines = embedder.call("similarities", pairs)
    return [{**row, "similarity": cosine} for row, cosine in zip(answers, cosines, strict=True)]


def _scores(rows: list[dict], candidates: list[int]) -> list[dict]:
    scores = []
    for layer in candidates:
        own = [row for row in rows if row["removed"] == [layer]]
        cosines = np.array([row["similarity"] for row in own])
        images = np.unique([row["sample_id"].rpartition("#")[0] for row in own], return_inverse=True)[1]
        low, high = cluster_bootstrap_interval(cosines, images)
        scores.append(
            {"layer": layer, "score": float(cosines.mean()), "low": low, "high": high, "samples": len(cosines)}
        )
    return scores


def job(run: Run) -> None:
    """Score the config's model and print its layers, least important first."""
    scored = stage(run, run.base_model(), prepare.stage(run))
    folder = run.make(scored)
    rows = sorted(read_table(Path(folder) / SCORES), key=lambda row: (-row["score"], row["layer"]))
    print("layer  similarity without it  95 % interval   (first = removed first)")
    for row in rows:
        print(f"{row['layer']:>5}  {row['score']:>21.4f}  [{row['low']:.4f}, {row['high']:.4f}]")
    print(f"ablate: scores and figure are in {folder}", flush=True)


if __name__ == "__main__":
    main(__doc__, job)
