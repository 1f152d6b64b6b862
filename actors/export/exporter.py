"""Writes and checks an export: what a worker does for jobs.export."""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from actors.checkpoint.config import read_config
from actors.checkpoint.loading import quiet
from actors.checkpoint.tensors import local_folder
from actors.export import gguf_vision, llama_cpp, reference
from actors.export.comparison import compare, refusal
from actors.export.gguf_export import MMPROJ, model_file, write_gguf
from actors.specs import ExportSettings, GateError, ModelSpec, Sample

ROOM = 8  # tokens of context besides prompt and answer


class Exporter:
    """A worker class; it holds no model between calls."""

    def __init__(self) -> None:
        quiet()

    def write(self, spec: ModelSpec, settings: ExportSettings, name: str, licence: str | None, out: str) -> dict:
        """Write the files into the folder `out`; return {sizes: {name: bytes}}. ValueError: it cannot be exported."""
        return write_gguf(spec, settings, name, licence, Path(out))

    def check(
        self, spec: ModelSpec, settings: ExportSettings, samples: Sequence[Sample], max_new_tokens: int, folder: str
    ) -> dict:
        """Return how the files' answers in llama.cpp, in a fresh process, compare with transformers'.

        {agreement: with transformers, or with transformers under llama.cpp's order of image features if that differs;
        plain_agreement: with transformers as it is}, each of `comparison.compare`. GateError: they are too far apart,
        or llama.cpp fails.
        """
        config = read_config(local_folder(spec.path, spec.revision), trust_remote_code=spec.trust_remote_code)
        class_token_last = gguf_vision.has_class_token(config) and settings.class_token == "last"
        with tempfile.TemporaryDirectory() as images:
            exact = replace(spec, dtype="float32")  # bfloat16's steps are larger than the tolerance
            prompts, references = reference.answer(exact, samples, max_new_tokens, Path(images), class_token_last)
            context = max(each["prompt_tokens"] for each in references[0]) + max_new_tokens + ROOM
            model, mmproj = (str(Path(folder) / name) for name in (model_file(settings.type), MMPROJ))
            files = llama_cpp.Files(model, mmproj, context, torch.get_num_threads())
            try:
                answers = llama_cpp.answer(files, prompts, max_new_tokens)
            except ValueError as error:
                raise GateError(str(error)) from None
        plain, agreement = compare(references[0], answers), compare(references[-1], answers)
        if wrong := refusal(settings.type, agreement):
            raise GateError(f"{wrong}{_hint(config, settings)}.")
        return {"agreement": agreement, "plain_agreement": plain}


def _hint(config, settings: ExportSettings) -> str:
    if not gguf_vision.has_class_token(config):
        return ""
    other = next(each for each in gguf_vision.CLASS_TOKEN if each != settings.class_token)
    return f"; this llama.cpp may have the class token elsewhere: try --export.class_token {other}"
