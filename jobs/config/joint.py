"""The settings of jobs.joint."""

from typing import Literal

from pydantic import Field, field_validator

from jobs.config.section import Count, Section


class JointConfig(Section):
    """Choosing removal or bits for every layer, under one memory budget."""

    budget_gib: float | None = Field(
        None,
        gt=0,
        description="limit of the whole model's estimate, on all its devices together (GiB); unset: that of the model "
        "with prune.layers removed and the rest at 4 bits",
    )
    options: list[Literal[0, 3, 4, 8, 16]] = Field(
        [0, 4, 8, 16],
        description="what a layer may become: 0 removed, 3, 4 or 8 bits, 16 as it is (YAML list); vLLM does not read 3",
    )
    damage: Literal["kl", "answer_similarity"] = Field(
        "kl", description="the damage to minimise, measured on the calibration questions; both are recorded"
    )
    rounds: Count = Field(
        2,
        description="rounds; each measures every single change, of the whole model, then of the best choice (rounds)",
    )
    changes: Count = Field(
        4, description="most layers in which a later round's choices differ from the best one (layers)"
    )
    proposed: Count = Field(8, description="choices of least predicted damage that a round measures (choices)")
    candidates: Count = Field(
        3,
        description="choices to build, recover and evaluate, beside as many uniform settings at each number of bits "
        "(choices)",
    )

    @field_validator("options")
    @classmethod
    def _several(cls, options: list[int]) -> list[int]:
        if len(set(options)) != len(options) or not set(options) - {0, 16}:
            raise ValueError(f"joint.options is {options}: give each once, and at least one of 3, 4 or 8.")
        return sorted(options)
