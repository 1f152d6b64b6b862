"""The settings of jobs.estimate."""

from pydantic import Field

from jobs.config.section import Count, Section


class EstimateConfig(Section):
    """Estimating the memory of settings: all combinations of removed and quantizer."""

    removed: int | list[int | list[int]] | None = Field(
        None,
        description="decoder layers to remove: a count, several counts [0, 2, 7], or layers by number [[23, 4]] "
        "(layers); unset: prune.layers",
    )
    quantizer: str | list[str] | None = Field(
        None, description="a method of quantize.method, or several [awq, nf4]; unset: quantize.method"
    )
    json_rows: bool = Field(False, description="print one JSON object per setting in place of a table")
    architecture: str | None = Field(
        None, description="config.json to read in place of model.path's, or a folder that holds one"
    )
    width: float = Field(
        1.0, gt=0, le=1, description="share of MLP channels and attention heads that are kept (fraction)"
    )
    batch: Count = Field(1, description="answers generated together (rows)")
    images: int = Field(
        0,
        ge=0,
        description="images in each prompt; 0: as in the papers' tables, and a column has the total with one (images)",
    )
    context: Count | None = Field(
        None, description="prompt length, images included (tokens); unset: the images and 64 tokens of text"
    )
    decode_tokens: Count | None = Field(None, description="answer length (tokens); unset: generation.max_new_tokens")
    devices: Count | None = Field(
        None, description="GPUs that the model is spread over (GPUs); unset: replicas.gpus, at least 1"
    )
    cuda_context_gib: float = Field(
        0.5, ge=0, description="memory of the CUDA context on every GPU; not part of the totals (GiB)"
    )
