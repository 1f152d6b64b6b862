"""The judge's section of the configuration."""

from typing import Literal

from pydantic import Field

from jobs.config.section import Count, Dtype, Section


class JudgeConfig(Section):
    """The LLM judge: where it runs, and what it is asked to score."""

    engine: Literal["none", "transformers", "vllm", "openai"] = Field(
        "none", description="transformers or vllm on Ray Serve, openai: any OpenAI-compatible endpoint; none: no judge"
    )
    model: str = Field("Qwen/Qwen2.5-32B-Instruct", description="checkpoint folder, hub id, or the endpoint's name")
    revision: str | None = Field(None, description="hub commit, tag or branch; unset: the newest")
    dtype: Dtype = Field("bfloat16", description="compute type of the judge's weights")
    trust_remote_code: bool = Field(False, description="run code that the judge's checkpoint brings along")
    url: str | None = Field(None, description="openai: the endpoint, up to and including /v1")
    key_variable: str | None = Field(None, description="openai: environment variable that holds the key; unset: none")
    logprobs: bool = Field(True, description="openai: whether the endpoint gives token probabilities")
    timeout: float = Field(120.0, gt=0, description="longest wait for one call (s)")
    replicas: Count = Field(1, description="copies of the judge (replicas)")
    max_replicas: Count | None = Field(None, description="copies under load (replicas); unset: replicas")
    gpus: int = Field(1, ge=0, description="GPUs of a replica; vllm: tensor-parallel size; 0: CPU")
    cpus: float = Field(1, gt=0, description="cores (and threads) of a replica")
    max_length: Count = Field(8192, description="longest prompt and output together (tokens)")
    batch: Count = Field(16, description="transformers: calls answered together (calls)")
    concurrency: Count = Field(64, description="calls in flight (calls)")
    keep: bool = Field(False, description="leave the judge running when the job ends, for the next one")
    tables: list[str] = Field(
        [], description="answers to score: CSV, Parquet or JSONL with question, reference, answer (YAML list)"
    )
    controls: Count = Field(8, description="questions for which controls are judged, too (questions)")
    agreement: str | None = Field(None, description="CSV of people's ratings to compare the verdicts with")
    serve: bool = Field(False, description="keep the judge up as an OpenAI-compatible endpoint on this machine")
    port: int = Field(8000, ge=1, le=65535, description="port of that endpoint, on loopback")
