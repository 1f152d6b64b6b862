"""The sections of the configuration for pruning and recovery."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from actors.criteria import WIDTH_CRITERIA
from actors.training.settings import OBJECTIVES, PARTS, check_parts, weigh_objectives
from jobs.config.section import Count, Section, WidthCriterion


class PruneConfig(Section):
    """Removing layers, and heads and channels of those that are left."""

    layers: int = Field(2, ge=0, description="decoder layers to remove (layers)")
    order: list[int] | None = Field(None, description="removal order, zero-based; unset: by the ablation's scores")
    search: Literal["one_shot", "greedy", "beam", "evolution"] = Field(
        "one_shot", description="one_shot: by the scores of single removals; the others measure sets of layers"
    )
    beam_width: Count = Field(3, description="beam: sets kept in every round (sets)")
    generations: Count = Field(8, description="evolution: rounds of mutation and selection (rounds)")
    offspring: Count = Field(16, description="evolution: mutated sets per round, compared by KL (sets)")
    survivors: Count = Field(4, description="evolution: sets per round that are compared by the criterion (sets)")
    width: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of the attention's head groups and the MLP's channels that every layer keeps; channels are "
        "rounded down to a multiple of quantize.group_size (fraction)",
    )
    width_criterion: WidthCriterion = Field(
        "taylor", description="; ".join(f"{name}: {words}" for name, words in WIDTH_CRITERIA.items())
    )
    width_samples: Count = Field(10, description="training conversations that the criterion uses (conversations)")


class RecoverConfig(Section):
    """Fine-tuning on the training split: what is trained, and towards what."""

    train: list[str] = Field(
        ["qlora"],
        description="what is trained (several: lora+projector, or a YAML list); "
        + "; ".join(f"{name}: {words}" for name, words in PARTS.items()),
    )
    objective: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {"sft": 1.0},
        description="what the answer tokens are trained towards (several: sft+hidden, or a YAML mapping to weights, "
        "scaled to a sum of 1); " + "; ".join(f"{name}: {words}" for name, words in OBJECTIVES.items()),
    )
    teacher: str | None = Field(
        None,
        description="checkpoint that patch and all objectives but sft compare with; unset: model.path, where a job "
        "prunes it itself",
    )
    temperature: float = Field(2.0, gt=0, description="temperature of the objectives logits and reverse_logits")
    fraction: float = Field(
        1.0, gt=0, le=1, description="share of the training conversations, drawn by seed (fraction)"
    )
    rank: Count = Field(16, description="LoRA rank r")
    alpha: Count = Field(8, description="LoRA alpha; the update is scaled by alpha / rank")
    patch_samples: Count = Field(64, description="conversations that the maps of `patch` are fitted on (conversations)")
    dropout: float = Field(0.0, ge=0, lt=1, description="LoRA dropout (fraction)")
    targets: list[str] = Field([], description="linears with an adapter, e.g. [q_proj, v_proj]; empty: all (YAML list)")
    epochs: float = Field(1.0, gt=0, description="passes over the training conversations (epochs)")
    batch: Count = Field(16, description="conversations per step (conversations)")
    micro_batch: Count = Field(16, description="conversations in memory at once (conversations)")
    learning_rate: float = Field(2e-4, gt=0, description="peak learning rate; cosine decay, 3 % warm-up")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="arithmetic of the training; auto: model.dtype, but bfloat16 or float32 in place of float16 "
        "(QLoRA without bfloat16 keeps it); the trained weights are in float32",
    )
    gradient_checkpointing: bool | None = Field(
        None, description="compute activations again in the backward pass to save memory; unset: on GPUs"
    )
    checkpoint_every: Count = Field(100, description="steps between snapshots, from which a killed training goes on")

    @field_validator("train", mode="before")
    @classmethod
    def _split_train(cls, value: Any) -> Any:
        return value.split("+") if isinstance(value, str) else value

    @field_validator("train")
    @classmethod
    def _check_train(cls, value: list[str]) -> list[str]:
        check_parts(value)
        return value

    @field_validator("objective", mode="before")
    @classmethod
    def _split_objective(cls, value: Any) -> Any:
        value = value.split("+") if isinstance(value, str) else value
        return dict.fromkeys(value, 1.0) if isinstance(value, list) else value

    @field_validator("objective")
    @classmethod
    def _weigh_objective(cls, value: dict[str, float]) -> dict[str, float]:
        return weigh_objectives(value)
