"""Answer the test split with a model, score the answers by the embedded baseline, measure memory and latency.

    python -m jobs.evaluate --config configs/derm-tiny.yaml
    python -m jobs.evaluate --config configs/derm-tiny.yaml --model.path runs/derm-tiny/artifacts/quantize-...

The baseline (disease name, word overlap, embedding similarity) is not an LLM judge and is never called one.
"""

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from actors.baseline import ClassName, baseline_score, name_verdict
from actors.maths.latency import merged
from actors.maths.statistics import cluster_bootstrap_interval, wilson_interval
from actors.specs import Sample
from cluster.artifacts import digest
from cluster.tables import PartTable, write_table
from jobs import card, prepare
from jobs.command import main
from jobs.config import EvaluateConfig
from jobs.run import Run, Source, Stage
from jobs.units import in_units

if TYPE_CHECKING:
    from cluster.pool import Pool

ANSWERS = "answers.parquet"
NAME_QUESTION = "name"
UNIT = 16


def stage(run: Run, model: Stage | Source, data: Stage) -> Stage:
    """Return the stage that evaluates `model` on the test split."""
    config = run.config
    settings = {
        **config.evaluate.model_dump(mode="json"),
        "embedder": run.embedder_identity(_embedder(run)),
        "dtype": config.model.dtype,
        "on_gpu": config.replicas.gpus > 0,
        "threads": config.replicas.cpus,
        "max_new_tokens": config.generation.max_new_tokens,
    }
    return Stage(
        "evaluate",
        3,
        settings,
        (model, data),
        lambda r, folder, facts: build(r, model, data, folder, facts),
        resume=True,
    )


def _embedder(run: Run) -> str:
    return run.config.evaluate.embedder or run.config.ablate.embedder


def build(run: Run, model: Stage | Source, data: Stage, folder: Path, facts: dict) -> None:
    """Measure in a fresh process first, then answer with all replicas, then score."""
    evaluate = run.config.evaluate
    rows = test_rows(run, data)
    samples = questions(rows)
    table = PartTable(folder / "units")
    given = {row["sample_id"]: row for row in table.all_rows()}
    todo = [sample for sample in samples if sample.id not in given]
    units = [todo[i : i + UNIT] for i in range(0, len(todo), UNIT)]
    reason = ""
    with run.replicas(model) as pool:
        profile = merged([profiled(pool, samples[0], evaluate, evaluate.timed_runs)])
        tokens = run.config.generation.max_new_tokens
        for part, outcome in in_units(pool, "answers", units, lambda part: (part, [()], tokens), "evaluate"):
            if outcome.error:
                reason = outcome.error
                print(f"evaluate: {part[0].id} failed three times and is left out: {reason}", flush=True)
            else:
                table.add(digest([sample.id for sample in part]), outcome.value)
                given |= {row["sample_id"]: row for row in outcome.value}
    if not given:
        raise RuntimeError(f"No question could be answered; the last one said: {reason}")
    scored = _score(run, [{**row, **given[row["sample_id"]]} for row in rows if row["sample_id"] in given])
    write_table(folder / ANSWERS, scored)
    facts["metrics"] = {**metrics(scored), "unanswered": len(samples) - len(given)}
    facts["profile"] = profile


def test_rows(run: Run, data: Stage) -> list[dict]:
    """Return the test split's conversations about the images that evaluate.limit allows."""
    rows = prepare.conversations(run.make(data), "test")
    images = set(chosen_images(rows, run.config.evaluate.limit))
    return [row for row in rows if row["image"] in images]


def questions(rows: list[dict]) -> list[Sample]:
    """Return what a worker needs to know of conversations in order to answer them."""
    return [Sample(row["sample_id"], row["image"], row["question"]) for row in rows]


def profiled(pool: "Pool", sample: Sample, evaluate: EvaluateConfig, timed_runs: int) -> dict:
    """Return one round of measurements on one question, by the first process of a pool of replicas."""
    settings = (evaluate.warmup_runs, timed_runs, evaluate.timed_tokens, evaluate.decode)
    return pool.call("profile", sample, *settings)


def chosen_images(rows: list[dict], limit: int | None) -> list[str]:
    """Return at most `limit` images, the classes taking turns (None: all)."""
    by_class: dict[str, list[str]] = {}
    for image, label in sorted({(row["image"], row["class"]) for row in rows}):
        by_class.setdefault(label, []).append(image)
    turns = sorted((turn, label, image) for label, own in by_class.items() for turn, image in enumerate(own))
    return [image for _, _, image in turns][:limit]


def _score(run: Run, rows: list[dict]) -> list[dict]:
    classes = [ClassName(kind.name, tuple(kind.synonyms)) for kind in run.config.data.classes]
    cosines = run.embedder(_embedder(run)).call("similarities", [(row["answer"], row["reference"]) for row in rows])
    return [
        {
            **{key: value for key, value in row.items() if key != "removed"},
            "similarity": cosine,
            "baseline": baseline_score(row["answer"], row["reference"], row["class"], cosine, classes),
            "verdict": name_verdict(row["answer"], row["class"], classes)
            if row["question_id"] == NAME_QUESTION
            else None,
        }
        for row, cosine in zip(rows, cosines, strict=True)
    ]


def metrics(rows: list[dict]) -> dict:
    """Summarise scored answers; shares and scores in percent, intervals at 95 % with the image as the unit."""
    groups = np.array([row["group"] for row in rows])
    scores = np.array([row["baseline"] for row in rows])
    names = Counter(row["verdict"] for row in rows if row["verdict"] is not None)
    asked = sum(names.values())
    low, high = cluster_bootstrap_interval(scores, groups)
    accuracy = wilson_interval(names["right"], asked) if asked else None
    return {
        "images": len({row["image"] for row in rows}),
        "answers": len(rows),
        "baseline_pct": 100 * float(scores.mean()),
        "baseline_interval_pct": [100 * low, 100 * high],
        "exact_pct": 100 * sum(row["answer"] == row["reference"] for row in rows) / len(rows),
        "name_accuracy": 100 * names["right"] / asked if asked else None,
        "name_accuracy_interval": [100 * bound for bound in accuracy] if accuracy else None,
        "name_verdicts": dict(names),
        "without_stop_pct": 100 * sum(not row["stopped"] for row in rows) / len(rows),
    }


def job(run: Run) -> None:
    """Evaluate the config's model and print what was found."""
    model = run.base_model()
    made = stage(run, model, prepare.stage(run))
    folder = run.make(made)
    facts = run.facts(made)
    card.refresh(Path(model.path), facts)
    print(json.dumps({"metrics": facts["metrics"], "profile": facts["profile"]}, indent=1))
    print(f"evaluate: answers are in {folder}/{ANSWERS}", flush=True)


if __name__ == "__main__":
    main(__doc__, job)
