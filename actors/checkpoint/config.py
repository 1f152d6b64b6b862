"""Reading config.json, and completing a processor from it."""

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from actors.checkpoint.foreign import reading
from actors.checkpoint.layouts import LAYOUTS

COPY = "copy it again from the original model"
PROCESSOR = "processor_config.json"
CONVERT = (
    "convert it to the llava-hf layout (convert_llava_weights_to_hf.py in transformers' models/llava), or give a "
    "llava-hf model as model.path"
)


def read_config(path: str | Path, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Return a LLaVA checkpoint's config; ValueError: it is missing, cannot be read, or is not a LLaVA's."""
    file = Path(path) / "config.json" if Path(path).is_dir() else path
    with reading(file, "", COPY):
        entries, _ = PreTrainedConfig.get_config_dict(path, revision=revision)
        kind, names = str(entries.get("model_type", "")), entries.get("architectures") or []
    if any(str(name).startswith("Llava") and str(name).endswith("ForCausalLM") for name in names):
        raise ValueError(f"{str(file)!r} is in the layout of the original LLaVA repository ({names[0]}): {CONVERT}.")
    if kind in LAYOUTS:
        raise ValueError(
            f"{str(file)!r} is of the model type {kind!r}: convert it (python -m jobs.convert {path} --out FOLDER), "
            "and give that folder as model.path."
        )
    registered = kind in CONFIG_MAPPING
    what = "transformers refuses it" if registered else f"transformers does not know the model type {kind!r}"
    with reading(file, what, COPY if registered else "give a LLaVA as model.path"):
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    return check_llava(config, repr(str(file)))


def check_llava(config, file: str = "The config.json"):
    """Return a checkpoint's config; ValueError: it does not describe a LLaVA-shaped model (tower, projector, decoder).

    LLaVA-NeXT and others have the same sections, but other prompts.
    """
    sections = (getattr(config, name, None) for name in ("text_config", "vision_config"))
    if not all(isinstance(section, PreTrainedConfig) for section in sections):
        raise ValueError(
            f"{file} of a {config.model_type!r} is not a LLaVA's: it lacks text_config or vision_config. "
            "Give a LLaVA checkpoint as model.path."
        )
    if config.text_config.num_hidden_layers < 1:
        raise ValueError(f"{file} says that there are {config.text_config.num_hidden_layers} decoder layers: {COPY}.")
    names = config.architectures
    if names != ["LlavaForConditionalGeneration"] and (names or config.model_type != "llava"):
        raise ValueError(
            f"{file} of a {config.model_type!r} names the architectures {names}, but only "
            "['LlavaForConditionalGeneration'] is supported: give a checkpoint of that kind as model.path."
        )
    return config


def building(config) -> AbstractContextManager[None]:
    """Turn what transformers raises while it builds a model from a config into a ValueError of one sentence."""
    return reading(config.name_or_path or "config.json", "transformers cannot build a model from its config.json", COPY)


def processor_entries(config) -> dict[str, Any]:
    """Return the processor's entries that determine the number of image tokens, from the model's config."""
    vision = config.vision_config
    return {
        "patch_size": vision.patch_size,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "num_additional_image_tokens": int("clip" in vision.model_type),  # CLIP's class token
    }


def complete_processor(processor, folder: Path, config) -> list[str]:
    """Give a processor the entries that older checkpoints' files lack, and return their names."""
    stored = _read_processor(folder)
    missing = {name: value for name, value in processor_entries(config).items() if stored.get(name) is None}
    for name, value in missing.items():
        setattr(processor, name, value)
    return list(missing)


def write_processor(folder: Path, config) -> None:
    """Complete a checkpoint's processor_config.json, so that other programs need no help."""
    stored = _read_processor(folder)
    missing = {name: value for name, value in processor_entries(config).items() if stored.get(name) is None}
    if missing:
        whole = {"processor_class": "LlavaProcessor", **stored, **missing}
        (folder / PROCESSOR).write_text(json.dumps(whole, indent=2) + "\n")


def _read_processor(folder: Path) -> dict[str, Any]:
    file = folder / PROCESSOR
    if not file.is_file():
        return {}
    with reading(file, "", COPY):
        return dict(json.loads(file.read_text(encoding="utf-8")))
