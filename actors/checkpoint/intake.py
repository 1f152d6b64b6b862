"""Checks a user's checkpoint before anything is computed.

No model is built: names and shapes are compared, and every tensor is read once. Whatever a library raises meanwhile
becomes a ValueError of one sentence, with the file, the reason and the remedy.
"""

import json
import re
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import GenerationConfig

from actors.checkpoint.foreign import reading
from actors.checkpoint.loading import load_processor, quiet, read_config
from actors.checkpoint.tensors import INDEX, local_folder, published_name, read_tensor, tensor_shapes, weight_files
from actors.decoding import check_greedy
from actors.memory import meta_model
from actors.probe import probe_inputs
from actors.specs import ModelSpec

COPY = "copy it again from the original model"
FILES = (
    *("config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", INDEX),
)
LAYER = re.compile(r".*?\.layers\.\d+\.")


class Intake:
    """Checks users' checkpoints; a worker class, so that the driver needs no torch."""

    def __init__(self):
        quiet()

    def look(self, spec: ModelSpec) -> dict:
        """Return {completed: the processor's entries that came from config.json}; ValueError: the first fault."""
        with reading(spec.path, "", "check the name and the network, or give a local folder"):
            folder = local_folder(spec.path, spec.revision)
        check_files(folder)
        config = read_config(spec.path, spec.revision, spec.trust_remote_code)
        model = meta_model(config, spec.trust_remote_code)
        if not getattr(config, "quantization_config", None):
            check_weights(folder, {name: tuple(p.shape) for name, p in model.named_parameters()}, config)
        check_features(folder, config)
        with reading(folder / "generation_config.json", "", f"remove it, or {COPY}"):
            exists = (folder / "generation_config.json").is_file()
            generation = GenerationConfig.from_pretrained(folder) if exists else GenerationConfig()
        check_greedy(generation, spec.path)
        processor = load_processor(spec.path, spec.revision, spec.trust_remote_code)
        check_processor(folder, processor, config)
        check_numbers(folder)
        return {"completed": list(getattr(processor, "completed_from_config", ()))}


def check_files(folder: Path) -> None:
    """Raise ValueError if a JSON file of the checkpoint cannot be read, or is not an object."""
    for name in FILES:
        file = folder / name
        if not file.exists():
            continue
        with reading(file, "", COPY):
            if not isinstance(json.loads(file.read_text(encoding="utf-8")), dict):
                raise TypeError("it is not a JSON object")


def check_weights(folder: Path, wanted: dict[str, tuple[int, ...]], config) -> None:
    """Raise ValueError if a tensor of the model that config.json describes is missing, or has another shape.

    wanted: shapes by transformers' names.
    """
    stored = {published_name(name): (shape, file) for name, (shape, file) in tensor_shapes(folder).items()}
    layers = {match[0] for name in wanted if (match := LAYER.match(published_name(name)))}
    for name, (_, file) in stored.items():
        if (match := LAYER.match(name)) and match[0] not in layers:
            raise ValueError(
                f"{str(file)!r} holds {name!r}, but config.json has fewer layers: one of them is another model's. "
                "Copy the weights and config.json again from one model."
            )
    tied = config.tie_word_embeddings or config.text_config.tie_word_embeddings
    for name, shape in wanted.items():
        published = published_name(name)
        if published not in stored:
            if tied and published == "language_model.lm_head.weight":
                continue
            raise ValueError(
                f"{str(folder)!r} lacks the tensor {published!r} of the model that its config.json describes: a shard "
                "is missing, or a file is another model's. Copy the weights and config.json again from one model."
            )
        actual, file = stored[published]
        if actual != shape:
            raise ValueError(
                f"{str(file)!r} holds {published!r} as {list(actual)}, but config.json says {list(shape)}: one of them "
                "is another model's. Copy the weights and config.json again from one model."
            )


def check_numbers(folder: Path) -> None:
    """Raise ValueError if a weight is NaN or infinite. All weights are read, one tensor in memory at a time."""
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as shard:
            names = list(shard.keys())
        for name in names:
            tensor = read_tensor(file, name)
            if tensor.is_floating_point() and not torch.isfinite(tensor.sum(dtype=torch.float64)):
                raise ValueError(
                    f"{str(file)!r} has NaN or infinite values in {name!r}: the checkpoint is broken. Copy it again "
                    "from the original model, or train it again."
                )


def check_features(folder: Path, config) -> None:
    """Raise ValueError if config.json takes the image features from a layer that the tower does not have."""
    chosen, layers = config.vision_feature_layer, config.vision_config.num_hidden_layers
    for layer in chosen if isinstance(chosen, list | tuple) else [chosen]:
        if not -layers - 1 <= layer <= layers:
            raise ValueError(
                f"{str(folder / 'config.json')!r}: vision_feature_layer is {layer}, but the tower has {layers} layers: "
                f"{COPY}."
            )


def check_processor(folder: Path, processor, config) -> None:
    """Raise ValueError if processor, tokenizer and chat template do not make a prompt that the model understands."""
    remedy = f"copy the processor's and the tokenizer's files again from the original model ({', '.join(FILES[2:7])})"
    with reading(folder, "its processor cannot prepare an image and a question", remedy):
        inputs = probe_inputs(processor)
        ids, pixels = inputs["input_ids"], inputs["pixel_values"]
        count, largest = int((ids == config.image_token_id).sum()), int(ids.max())
        side = tuple(pixels.shape[-2:])
    wanted, vision = config.vision_config.image_size, config.vision_config
    full = config.vision_feature_select_strategy == "full"
    expected = (wanted // vision.patch_size) ** 2 + (full and "clip" in vision.model_type)
    if count != expected or side != (wanted, wanted):
        raise ValueError(
            f"The processor of {str(folder)!r} makes {count} image tokens and {side[0]} x {side[1]} pixels, but the "
            f"tower in config.json needs {expected} and {wanted} x {wanted}: one of them is another model's. "
            f"{remedy.capitalize()}."
        )
    if largest >= config.text_config.vocab_size:
        raise ValueError(
            f"The tokenizer of {str(folder)!r} gives the token id {largest}, but the vocabulary in config.json has "
            f"{config.text_config.vocab_size} tokens: one of them is another model's. {remedy.capitalize()}."
        )
