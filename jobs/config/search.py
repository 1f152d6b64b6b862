"""The search's section of the configuration."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from actors.training.settings import PATCH, read_recovery
from jobs.config.section import Bits, Count, Quantizer, Section


class BudgetConfig(Section):
    """Limits of the model in use; unset: no limit."""

    memory_gib: float | None = Field(None, gt=0, description="memory of the fullest device, see jobs.search (GiB)")
    ms_per_token: float | None = Field(None, gt=0, description="time of a token, batch 1 (ms)")


def _check_recoveries(labels: list[str]) -> list[str]:
    for label in labels:
        if label != "none":
            read_recovery(label)
    return labels


Depths = Annotated[
    list[Annotated[int, Field(ge=0)]],
    Field(min_length=1, description="decoder layers to remove, as prune does (layers, YAML list)"),
]
Widths = Annotated[
    list[Annotated[float, Field(gt=0, le=1)]],
    Field(min_length=1, description="share of heads and channels to keep, as prune.width does (fractions, YAML list)"),
]
Recoveries = Annotated[
    list[str],
    AfterValidator(_check_recoveries),
    Field(
        min_length=1,
        description="fine-tuning after removal: none, or what recover.train and recover.objective take, joined by + "
        "and a share of the data (qlora+sft+hidden, projector+5%); all else as in the section recover (YAML list)",
    ),
]


class GridConfig(Section):
    """Depths, widths and recoveries, each combined with each."""

    depths: Depths = Field([0])
    widths: Widths = Field([1.0])
    recoveries: Recoveries = Field(["none"])


class SearchConfig(Section):
    """Which settings jobs.search tries: every depth with every width, recovery, quantizer and its bits."""

    depths: Depths = Field([0, 2, 4, 7])
    widths: Widths = Field([1.0])
    recoveries: Recoveries = Field(["none", "qlora"])
    also: list[GridConfig] = Field(
        [], description="further settings: every one is depths, widths and recoveries of its own (YAML list)"
    )
    quantizers: list[Quantizer] = Field(
        ["none", "int8", "awq", "nf4"], min_length=1, description="quantizers: those of quantize.method (YAML list)"
    )
    bits: list[Bits] = Field(
        [4], min_length=1, description="bits of the quantizers that have a choice (bits, YAML list)"
    )
    budget: BudgetConfig = BudgetConfig()
    screen_images: Count | None = Field(
        None,
        description="test images of a first, cheap evaluation: a setting that is dominated on them is not evaluated on "
        "the others (images); unset: no screening",
    )
    max_trials: Count = Field(
        64, description="most settings to try; if there are more, Optuna suggests this many of them (settings)"
    )
    resume: bool = Field(False, description="continue the search in run_dir; an error if there is none")
    resolve_only: bool = Field(False, description="answer from the rows of the search in run_dir; computes nothing")
    loggers: list[Literal["tensorboard", "mlflow"]] = Field(
        [], description="further logs that Ray Tune writes into run_dir/search (YAML list)"
    )

    @property
    def grids(self) -> list[GridConfig]:
        """All depths, widths and recoveries that are combined with each other."""
        return [GridConfig(depths=self.depths, widths=self.widths, recoveries=self.recoveries), *self.also]

    @model_validator(mode="after")
    def _check_grids(self) -> "SearchConfig":
        for grid in self.grids:
            if min(grid.widths) < 1 and any(PATCH in label.split("+") for label in grid.recoveries):
                raise ValueError(
                    f"search combines width {min(grid.widths):g} with a patch, which works at full width only: put one "
                    "of them into search.also."
                )
        return self
