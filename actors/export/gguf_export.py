"""Writing a checkpoint as two GGUF files for llama.cpp: the language model, and tower with projector (mmproj)."""

from pathlib import Path

import gguf

from actors.checkpoint.config import read_config
from actors.checkpoint.loading import load_processor
from actors.checkpoint.tensors import local_folder
from actors.export import gguf_text, gguf_vision
from actors.export.ggml import TYPES, Kind
from actors.export.gguf_file import describe, write_file
from actors.export.gguf_tokenizer import write_vocabulary
from actors.gate.linears import layout_of, stated_group
from actors.maths.blocks import BLOCK
from actors.quantizers.table import GEMM
from actors.specs import ExportSettings, ModelSpec

MMPROJ = "mmproj-F16.gguf"


def model_file(type_name: str) -> str:
    """Return the name of the language model's file."""
    return f"model-{type_name}.gguf"


def check_gguf(config, processor, type_name: str) -> None:
    """Raise ValueError if this checkpoint cannot become a GGUF of a type, and say what would do."""
    gguf_text.check_text(config, type_name)
    gguf_vision.check_vision(config, processor.image_processor)
    if not getattr(config, "quantization_config", None):
        return
    if layout_of(config) is not GEMM:
        raise ValueError(
            "Only weights of 16 bits and AWQ's layout become a GGUF: export the checkpoint before rounding."
        )
    if TYPES[type_name].linears == Kind.Q4_0:
        raise ValueError(
            f"export.type {type_name} would round the weights again: Q4_1 holds AWQ's numbers as they are."
        )
    if TYPES[type_name].linears == Kind.Q4_1 and stated_group(config) % BLOCK:
        raise ValueError(
            f"Q4_1 has blocks of {BLOCK}, the checkpoint groups of {stated_group(config)}: choose F16 or Q8_0."
        )


def write_gguf(spec: ModelSpec, settings: ExportSettings, name: str, licence: str | None, out: Path) -> dict:
    """Write both files into `out` and return {sizes: {name: bytes}}. ValueError: see `check_gguf`."""
    folder = local_folder(spec.path, spec.revision)
    config = read_config(folder, trust_remote_code=spec.trust_remote_code)
    processor = load_processor(spec.path, spec.revision, spec.trust_remote_code)
    type_name = settings.type
    check_gguf(config, processor, type_name)
    architecture = gguf.MODEL_ARCH_NAMES[gguf_text.ARCHITECTURES[config.text_config.model_type].name]
    text = describe(gguf.GGUFWriter(None, architecture), name, licence)
    gguf_text.write_keys(text, config, type_name)
    write_vocabulary(text, folder, processor, config.text_config.vocab_size)
    write_file(text, out / model_file(type_name), gguf_text.entries(folder, config, type_name))
    vision = describe(gguf.GGUFWriter(None, "clip"), name, licence)
    gguf_vision.write_keys(vision, config, processor.image_processor)
    write_file(vision, out / MMPROJ, gguf_vision.entries(folder, config, settings.class_token))
    return {"sizes": {file.name: file.stat().st_size for file in sorted(out.glob("*.gguf"))}}
