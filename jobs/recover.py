"""Fine-tune a model with LoRA or QLoRA on the training split, and merge the update into its weights.

    python -m jobs.recover --config configs/derm-tiny.yaml --model.path runs/derm-tiny/artifacts/prune-...

recovers a pruned checkpoint (paper, section 3.3). Run on a general LLaVA, the same job is the paper's first step,
fine-tuning to the domain:

    ray job submit --working-dir . -- python -m jobs.recover --config configs/llava-1.5-7b-dermnet.yaml \\
        --data.root /shared/dermnet --run_dir /shared/runs/dermnet
"""

from pathlib import Path
from typing import TypedDict

from actors.specs import Change, Conversation, LoraSettings
from jobs import prepare, verify
from jobs.core.command import main
from jobs.core.progress import Progress
from jobs.core.rows import Rows
from jobs.core.run import Run
from jobs.core.stage import Source, Stage
from jobs.reporting import card


class LossRow(TypedDict):
    """One optimiser step."""

    step: int
    loss: float  # nats per answer token, mean of the batch
    learning_rate: float


LOSSES = Rows("losses.parquet", LossRow)


def stage(run: Run, model: Stage | Source, data: Stage) -> Stage:
    """Return the stage that fine-tunes `model` on the training split."""
    settings = {
        **run.config.recover.model_dump(mode="json", exclude={"micro_batch"}),
        "seed": run.config.seed,
        "dtype": run.config.model.dtype,
    }
    return Stage("recover", 4, settings, (model, data), lambda r, folder, facts: build(r, model, data, folder, facts))


def training_conversations(folder: str) -> list[Conversation]:
    """Return the training split of a data artifact."""
    return [
        Conversation(row["sample_id"], row["image"], row["question"], row["reference"])
        for row in prepare.conversations(folder, "train")
    ]


def build(run: Run, model: Stage | Source, data: Stage, folder: Path, facts: dict) -> None:
    """Train, record the loss of every step, write the merged checkpoint."""
    settings = LoraSettings(**run.config.recover.model_dump(), seed=run.config.seed)
    conversations = training_conversations(run.make(data))
    spec = run.model_spec(model)
    losses = []
    with run.workers.worker("actors.trainer:LoraTrainer", spec=spec) as worker:
        steps = settings.steps(len(conversations))
        with Progress("recover", steps) as progress:
            for row in worker.stream("train", conversations, settings, str(folder)):
                losses.append(row)
                progress.at(row["step"], f"loss {row['loss']:.4f}")
    LOSSES.write(folder, losses)
    facts["conversations"] = len(conversations)
    facts["first_loss"], facts["last_loss"] = losses[0]["loss"], losses[-1]["loss"]
    facts["gate"] = verify.verify_change(run, folder, model, Change.TRAINED)
    step = {
        "kind": "recover",
        "settings": run.config.recover.model_dump(mode="json", exclude={"micro_batch"}),
        **{key: facts[key] for key in ("conversations", "first_loss", "last_loss")},
        "digest": card.conversations_digest(run.make(data), [c.id for c in conversations]),
    }
    card.finish(run, model, folder, facts, step)


def job(run: Run) -> None:
    """Fine-tune the config's model."""
    print(f"recover: the checkpoint is {run.make(stage(run, run.base_model(), prepare.stage(run)))}", flush=True)


if __name__ == "__main__":
    main(__doc__, job)
