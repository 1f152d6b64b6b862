"""Settings of small trainings."""

from actors.training.settings import TrainingSettings

_SMALL = TrainingSettings(
    train=("lora",),
    objective={"sft": 1.0},
    temperature=2.0,
    rank=4,
    alpha=8,
    dropout=0.0,
    targets=(),
    epochs=1,
    batch=4,
    micro_batch=2,
    learning_rate=1e-2,
    precision="auto",
    gradient_checkpointing=None,
    checkpoint_every=1000,
    seed=3,
)


def training_settings(**changes) -> TrainingSettings:
    """Return settings of a LoRA fine-tuning in small steps, with changes."""
    return TrainingSettings(**{**vars(_SMALL), **changes})
