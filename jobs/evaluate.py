"""Answer the test split with a model, score the answers by the embedded baseline, measure memory and latency.

    python -m jobs.evaluate --config configs/derm-tiny.yaml
    python -m jobs.evaluate --config configs/derm-tiny.yaml --model.path runs/derm-tiny/artifacts/quantize-...

The baseline (disease name, word overlap, embedding similarity) is not an LLM judge and is never called one.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from actors.images import blank_image
from actors.maths.latency import merge_rounds
from actors.specs import Sample
from cluster.artifacts import digest
from cluster.tables import PartTable
from jobs import prepare
from jobs.config.schema import EvaluateConfig
from jobs.core.command import main
from jobs.core.conversation_rows import ConversationRow
from jobs.core.facts import EvaluateFacts
from jobs.core.run import Run
from jobs.core.stage import Source, Stage
from jobs.core.units import in_units, whole_images
from jobs.reporting import card
from jobs.scoring.image_controls import blank_rows, blank_samples, summary, swapped_rows
from jobs.scoring.metrics import metrics, score_answers
from jobs.scoring.rows import ANSWERS, CONTROLS

if TYPE_CHECKING:
    from cluster.pool import Pool

LOG = logging.getLogger("jobs")

BLANK_IMAGE = "blank.png"
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
        6,
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
    answer_of = {row["sample_id"]: row for row in table.all_rows()}
    blank: dict[str, dict] = {}
    failed: dict[str, str] = {}
    with run.workers.replicas(run.model_spec(model)) as pool:
        profile = merge_rounds([measure_round(pool, samples[0], evaluate, evaluate.timed_runs)])
        for part, answers in _answer_units(
            run, pool, [each for each in samples if each.id not in answer_of], "evaluate", failed
        ):
            table.add(digest([sample.id for sample in part]), answers)
            answer_of |= {row["sample_id"]: row for row in answers}
        if not answer_of:
            reason = list(failed.values())[-1]
            raise RuntimeError(f"No question could be answered; the last error: {reason}")
        if evaluate.controls:
            blank_image().save(folder / BLANK_IMAGE)
            blank_questions = blank_samples(rows, str(folder / BLANK_IMAGE))
            for _, answers in _answer_units(run, pool, blank_questions, "blank image", failed):
                blank |= {row["sample_id"]: row for row in answers}
    answered = [{**row, **answer_of[row["sample_id"]]} for row in rows if row["sample_id"] in answer_of]
    scored = _score_answers(run, answered)
    ANSWERS.write(folder, scored)
    names = [kind.name for kind in run.config.data.classes]
    facts["metrics"] = {**metrics(scored, names), "unanswered": len(samples) - len(answer_of)}
    facts["controls"] = None
    if evaluate.controls:
        controls = _score_answers(run, [*blank_rows(answered, blank), *swapped_rows(answered, run.config.seed)])
        if controls:
            CONTROLS.write(folder, controls)
        facts["controls"] = summary(scored, controls)
    facts["profile"] = profile


def _answer_units(
    run: Run, pool: "Pool", samples: list[Sample], label: str, failed: dict[str, str]
) -> Iterator[tuple[list[Sample], list[dict]]]:
    """Yield (unit, its answers) as they come; the error of a question that fails three times goes to `failed`."""
    units = whole_images(samples, UNIT)
    tokens = run.config.generation.max_new_tokens
    for part, outcome in in_units(pool, "answers", units, lambda part: (part, [()], tokens), label):
        if outcome.error:
            failed[part[0].id] = outcome.error
            LOG.warning(f"evaluate: {part[0].id} failed three times and is left out: {outcome.error}")
        else:
            yield part, outcome.value


def test_rows(run: Run, data: Stage) -> list[ConversationRow]:
    """Return the test split's conversations about the images that evaluate.limit allows."""
    rows = prepare.conversations(run.make(data), "test")
    images = set(choose_images(rows, run.config.evaluate.limit))
    return [row for row in rows if row["image"] in images]


def questions(rows: Sequence[ConversationRow]) -> list[Sample]:
    """Return conversations as samples to answer: without their references."""
    return [Sample(row["sample_id"], row["image"], row["question"]) for row in rows]


def measure_round(pool: "Pool", sample: Sample, evaluate: EvaluateConfig, timed_runs: int) -> dict:
    """Measure memory and latency on one question, in the first process of a pool of replicas."""
    settings = (evaluate.warmup_runs, timed_runs, evaluate.timed_tokens, evaluate.decode)
    return pool.call("profile", sample, *settings)


def choose_images(rows: Sequence[ConversationRow], limit: int | None) -> list[str]:
    """Return at most `limit` images (None: all), by round robin over the classes."""
    by_class: dict[str, list[str]] = {}
    for image, label in sorted({(row["image"], row["class"]) for row in rows}):
        by_class.setdefault(label, []).append(image)
    turns = sorted(
        (turn, label, image)
        for label, images_of_class in by_class.items()
        for turn, image in enumerate(images_of_class)
    )
    return [image for _, _, image in turns][:limit]


def _score_answers(run: Run, rows: Sequence[dict]) -> list:
    pairs = [(row["answer"], row["reference"]) for row in rows]
    return score_answers(
        rows, run.workers.embedder(_embedder(run)).call("similarities", pairs), run.config.data.classes
    )


def job(run: Run) -> None:
    """Evaluate the config's model and print metrics, controls and profile."""
    model = run.base_model()
    evaluation = stage(run, model, prepare.stage(run))
    folder = run.make(evaluation)
    facts = run.facts(evaluation, EvaluateFacts)
    card.refresh(Path(model.path), facts)
    results = {"metrics": facts["metrics"], "controls": facts["controls"], "profile": facts["profile"]}
    print(json.dumps(results, indent=1), flush=True)
    LOG.info(f"evaluate: answers are in {folder}/{ANSWERS}")


if __name__ == "__main__":
    main(__doc__, job)
