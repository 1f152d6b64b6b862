"""The calibration set: questions of the training split, on which layers are scored."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from actors.criteria import CRITERIA
from actors.maths.sampling import draw_calibration
from actors.specs import Conversation
from jobs import prepare
from jobs.core.run import Run
from jobs.core.stage import Source, Stage
from jobs.ranking.measurements import Measurements


def calibration_settings(run: Run) -> dict:
    """Return the settings that decide which questions `calibration_samples` draws."""
    config = run.config.ablate
    by_image = {} if config.per_image is None else {"per_image": config.per_image}
    return {"samples": config.samples, "seed": run.config.seed, **by_image}


def calibration_samples(run: Run, data: Stage) -> list[Conversation]:
    """Draw ablate.samples questions from the training split."""
    rows = prepare.conversations(run.make(data), "train")
    picks = draw_calibration([row["image"] for row in rows], **calibration_settings(run))
    return [
        Conversation(rows[i]["sample_id"], rows[i]["image"], rows[i]["question"], rows[i]["reference"]) for i in picks
    ]


@contextmanager
def open_measurements(
    run: Run, model: Stage | Source, data: Stage, criteria: Sequence[str]
) -> Iterator[tuple[Measurements, int]]:
    """Yield the Measurements of `model` on the calibration questions, and its number of layers.

    criteria: those that will be measured; the embedder is loaded only if one of them compares answers. ValueError,
    before anything is measured: it cannot be loaded.
    """
    samples = calibration_samples(run, data)
    compared = any(CRITERIA[criterion].measure == "answers" for criterion in criteria)
    critic = {
        "max_new_tokens": run.config.generation.max_new_tokens,
        "embedder": run.config.ablate.embedder if compared else None,
        "seed": run.config.seed,
    }
    with run.workers.replicas(run.model_spec(model), "actors.critic:LayerCritic", **critic) as pool:
        yield Measurements(run, pool, model, data, samples), pool.call("layer_count")
