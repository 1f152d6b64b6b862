"""The settings of jobs.export."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from actors.export.formats import FORMATS
from jobs.config.section import Count, OneOf, Section


def _types() -> list[str]:
    return list(dict.fromkeys(name for each in FORMATS.values() for name in each.types))


class ExportConfig(Section):
    """A checkpoint in another program's format."""

    format: Annotated[str, OneOf(lambda: FORMATS)] = Field(
        "gguf", description="; ".join(f"{name}: {each.words}" for name, each in FORMATS.items())
    )
    type: Annotated[str, OneOf(_types)] = Field(
        "Q4_0",
        description="weights of the language model; embeddings and head have at least 8 bits; of a checkpoint in AWQ's "
        "layout Q4_1 holds the numbers as they are",
    )
    class_token: Literal["last", "first"] = Field(
        "last",
        description="where llama.cpp has the class token of a CLIP tower; first: a llama.cpp with pull request 25844",
    )
    questions: Count = Field(8, description="test questions that llama.cpp and transformers both answer (questions)")
    tokens: Count = Field(16, description="longest of these answers (tokens)")

    @model_validator(mode="after")
    def _type_of_format(self) -> "ExportConfig":
        if self.type not in (known := FORMATS[self.format].types):
            raise ValueError(f"export.type {self.type} is none of {self.format}'s: choose {', '.join(known)}.")
        return self
