"""The formats that a checkpoint is exported to: one entry each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """One format.

    writer: the package that writes it. worker: "module:class" with the methods of `actors.export.exporter.Exporter`.
    types: what its weights may be. package: the package that the check runs it with, as it is imported; install: how to
    get that.
    """

    words: str
    writer: str
    worker: str
    types: Sequence[str]
    package: str
    install: str


FORMATS: Mapping[str, Format] = {
    "gguf": Format(
        "files for llama.cpp and Ollama",
        "gguf",
        "actors.export.exporter:Exporter",
        ("F16", "Q8_0", "Q4_1", "Q4_0"),
        "xllamacpp",
        "pip install gguf xllamacpp",
    ),
}
