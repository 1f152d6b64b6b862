"""Fine-tune a model on the training split, towards the reference answers or towards a teacher.

    python -m jobs.recover --config configs/derm-tiny.yaml --model.path runs/derm-tiny/artifacts/prune-... \\
        --recover.train projector
    python -m jobs.recover --config configs/derm-tiny.yaml --model.path runs/derm-tiny/artifacts/prune-... \\
        --recover.train lora --recover.objective sft+hidden --recover.teacher actors/derm_tiny/checkpoint

recovers a pruned checkpoint (paper, section 3.3; second paper, section 3.2). Run on a general LLaVA, the same job is
the paper's first step, fine-tuning to the domain:

    ray job submit --working-dir . -- python -m jobs.recover --config configs/llava-1.5-7b-dermnet.yaml \\
        --data.root /shared/dermnet --run_dir /shared/runs/dermnet

LoRA's update is merged into the weights. A killed training goes on from its last snapshot.
"""

import logging
import math
import shutil
from dataclasses import fields
from pathlib import Path
from typing import TypedDict

from actors.maths.sampling import draw_places
from actors.specs import Change, Conversation
from actors.training.settings import (
    ADAPTERS,
    PATCH,
    SNAPSHOTS,
    Trained,
    TrainingSettings,
    needs_teacher,
    recovery_label,
)
from jobs import prepare, verify
from jobs.config.pruning import RecoverConfig
from jobs.core.command import main
from jobs.core.progress import Progress
from jobs.core.rows import Rows
from jobs.core.run import Run
from jobs.core.stage import Source, Stage
from jobs.core.text import size
from jobs.reporting import card

LOG = logging.getLogger("jobs")
SHARD = 64  # conversations whose states are one file
# Options that change no number, and those that the name of a parent has
_UNSEEN = {"micro_batch", "gradient_checkpointing", "checkpoint_every", "teacher", "patch_samples"}


class LossRow(TypedDict):
    """One optimiser step."""

    step: int
    loss: float  # of all objectives, weighted, per answer token, mean of the batch
    cross_entropy: float  # nats per answer token, mean of the batch
    learning_rate: float


LOSSES = Rows("losses.parquet", LossRow)


def stage(run: Run, model: Stage | Source, data: Stage) -> Stage | Source:
    """Return the last stage of recovering `model`, patch and training; `model` itself, if there is nothing to do.

    The teacher, or the original of a patch, is the config's, or its model.
    """
    if PATCH in run.config.recover.train and run.config.prune.width < 1:
        raise ValueError("recover.train patch works at full width only: set prune.width to 1, or remove patch.")
    if PATCH in run.config.recover.train and model != (original := _teacher(run)):
        model = patch_stage(run, model, original, data)
    return _training_stage(run, model, data) if _trained(run) else model


def _trained(run: Run) -> list[str]:
    return [part for part in run.config.recover.train if part != PATCH]


def _teacher(run: Run) -> Source:
    path = run.config.recover.teacher
    return run.source(path, "recover.teacher") if path else run.base_model()


def _training_stage(run: Run, model: Stage | Source, data: Stage) -> Stage:
    recover = run.config.recover
    settings = {
        **recover.model_dump(mode="json", exclude=_UNSEEN),
        "train": _trained(run),
        "seed": run.config.seed,
        "dtype": run.config.model.dtype,
    }
    states = None
    if needs_teacher(recover.objective):
        states = states_stage(run, _teacher(run), data)
    parents = (model, data, states) if states else (model, data)
    return Stage(
        "recover",
        5,
        settings,
        parents,
        lambda r, folder, facts: build(r, model, data, states, folder, facts),
        resume=True,
    )


def patch_stage(run: Run, model: Stage | Source, original: Source, data: Stage) -> Stage:
    """Return the stage that fits linear maps in place of the layers that `model` lacks of `original`."""
    settings = {
        "samples": run.config.recover.patch_samples,
        "seed": run.config.seed,
        "dtype": run.config.model.dtype,
    }
    return Stage(
        "patch",
        1,
        settings,
        (model, original, data),
        lambda r, folder, facts: patch(r, model, original, data, folder, facts),
    )


def states_stage(run: Run, teacher: Source, data: Stage) -> Stage:
    """Return the stage that writes the teacher's hidden states on the training split; all its students share it."""
    layers = "layers" in run.config.recover.objective
    settings = {
        "layers": layers,
        "fraction": run.config.recover.fraction,
        "seed": run.config.seed,
        "dtype": run.config.model.dtype,
    }
    return Stage(
        "states",
        1,
        settings,
        (teacher, data),
        lambda r, folder, facts: write_states(r, teacher, data, layers, folder, facts),
        resume=True,
    )


def _draw_share(run: Run, data: Stage) -> list[Conversation]:
    """Return the share recover.fraction of the training split; a larger share holds a smaller one."""
    conversations = prepare.training_conversations(run.make(data))
    count = math.ceil(run.config.recover.fraction * len(conversations))
    return [conversations[place] for place in sorted(draw_places(len(conversations), count, run.config.seed))]


def write_states(run: Run, teacher: Source, data: Stage, layers: bool, folder: Path, facts: dict) -> None:
    """Run the teacher over the training conversations, on several workers if there are, and write its states."""
    conversations = _draw_share(run, data)
    cuts = [conversations[i : i + SHARD] for i in range(0, len(conversations), SHARD)]
    shards = {f"states-{number:05d}": cut for number, cut in enumerate(cuts)}
    missing = [name for name in shards if not (folder / f"{name}.safetensors").is_file()]
    workers, rows = run.workers.count_workers(), run.config.recover.micro_batch
    with (
        run.workers.worker(
            "actors.training.teacher:Teacher", workers, spec=run.model_spec(teacher), rows=rows, layers=layers
        ) as pool,
        Progress("teacher's states", len(missing)) as progress,
    ):
        pool.call("write_head", str(folder))
        for outcome in pool.map("write_states", [(name, (shards[name], str(folder), name)) for name in missing]):
            if outcome.error:
                first, last = shards[outcome.key][0].id, shards[outcome.key][-1].id
                raise RuntimeError(f"The teacher fails on the conversations from {first} to {last}: {outcome.error}")
            progress.step(note="files")
    facts["conversations"] = len(conversations)
    facts["bytes"] = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    LOG.info(f"states: of {len(conversations)} conversations, {size(facts['bytes'])}")


def patch(run: Run, model: Stage | Source, original: Source, data: Stage, folder: Path, facts: dict) -> None:
    """Fit the maps on training conversations, and write the patched checkpoint; ValueError: no layer has a map."""
    chosen = prepare.draw_conversations(run.make(data), run.config.recover.patch_samples, run.config.seed)
    pruned, kept = run.model_spec(model), card.kept_layers(run, model, original)
    if others := [step["kind"] for step in card.steps_since(run, model, original) if step["kind"] != "prune"]:
        raise ValueError(
            f"recover.train patch must directly follow the removal of layers, but {run.make(model)!r} was changed "
            f"afterwards by {', '.join(others)}: remove patch from recover.train."
        )
    with run.workers.worker("actors.training.patch:Patcher", spec=run.model_spec(original)) as worker:
        facts.update(worker.call("patch", pruned, kept, chosen, str(folder)))
    changed = Trained((PATCH,), layers=tuple(facts["layers"]))
    facts["gate"] = verify.verify_change(run, folder, model, Change.TRAINED, trained=changed)
    step = {
        "kind": "patch",
        "layers": facts["layers"],
        "conversations": len(chosen),
        "digest": card.conversations_digest(run.make(data), [c.id for c in chosen]),
    }
    card.finish(run, model, folder, facts, step)
    shares = ", ".join(f"{each:.2f}" for each in facts["errors"])
    LOG.info(f"patch: maps in layers {facts['layers']}; squared error as a share of that without a map: {shares}")


def build(run: Run, model: Stage | Source, data: Stage, states: Stage | None, folder: Path, facts: dict) -> None:
    """Train, record the loss of every step, write the new checkpoint."""
    recover = run.config.recover
    names = {field.name for field in fields(TrainingSettings)} - {"seed"}
    options = {name: getattr(recover, name) for name in names} | {"train": _trained(run)}
    settings = TrainingSettings(**options, seed=run.config.seed)
    conversations = _draw_share(run, data)
    spec = run.model_spec(model)
    teacher = (run.make(states), card.kept_layers(run, model, _teacher(run))) if states else ()
    for leftover in folder.iterdir():  # of a run that was killed while it wrote the checkpoint
        if leftover.name != SNAPSHOTS:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    losses = []
    count = min(run.workers.count_workers(), recover.batch)
    with (
        run.workers.group("actors.training.trainer:Trainer", count, folder / SNAPSHOTS, spec=spec) as worker,
        Progress("recover", settings.steps(len(conversations))) as progress,
    ):
        for row in worker.stream("train", conversations, settings, str(folder), *teacher):
            losses.append(row)
            progress.at(row["step"], f"loss {row['loss']:.4f}")
    LOSSES.write(folder, losses)
    facts["conversations"] = len(conversations)
    facts["first_loss"], facts["last_loss"] = losses[0]["loss"], losses[-1]["loss"]
    try:
        changed = Trained(settings.train, settings.targets)
        facts["gate"] = verify.verify_change(run, folder, model, Change.TRAINED, trained=changed)
    except verify.Refused:
        shutil.rmtree(folder)  # else the same training would be found again, and refused again
        raise
    shutil.rmtree(folder / SNAPSHOTS, ignore_errors=True)
    step = {
        "kind": "recover",
        "settings": {name: value for name, value in _public_settings(recover).items() if value != ""},
        **{key: facts[key] for key in ("conversations", "first_loss", "last_loss")},
        "digest": card.conversations_digest(run.make(data), [c.id for c in conversations]),
    }
    card.finish(run, model, folder, facts, step)


def describe(recover: RecoverConfig) -> str:
    """Return what is trained and towards what, for reports."""
    adapter = f", r = {recover.rank}, alpha = {recover.alpha}" if set(ADAPTERS) & set(recover.train) else ""
    part = "" if recover.fraction == 1 else f", {100 * recover.fraction:g} % of the data"
    return f"{recovery_label(recover.train, recover.objective)}{adapter}{part}"


def _public_settings(recover: RecoverConfig) -> dict:
    """Return the options for the model card: each as text, without paths and what changes no number."""
    settings = recover.model_dump(mode="json", exclude=_UNSEEN)
    objective = " + ".join(f"{weight:.3g} {name}" for name, weight in recover.objective.items())
    trained = [part for part in recover.train if part != PATCH]
    return {**settings, "train": "+".join(trained), "objective": objective, "targets": "+".join(recover.targets)}


def job(run: Run) -> None:
    """Fine-tune the config's model."""
    recover = run.config.recover
    if recover.teacher is None and (needs_teacher(recover.objective) or PATCH in recover.train):
        label = recovery_label(recover.train, recover.objective)
        raise ValueError(
            f"The recovery {label} needs a teacher: set recover.teacher to the checkpoint from which "
            f"{run.config.model.path!r} was pruned."
        )
    print(f"recover: the checkpoint is {run.make(stage(run, run.base_model(), prepare.stage(run)))}", flush=True)


if __name__ == "__main__":
    main(__doc__, job)
