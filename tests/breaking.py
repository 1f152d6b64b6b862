"""Ways to break the files of a checkpoint, as they are found broken in public."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Break = Callable[[Path], None]
INDEX = "model.safetensors.index.json"
JSON_FILES = (
    *("config.json", "generation_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"),
    INDEX,
)
SHARD = "model-00002-of-00002.safetensors"
UP = "language_model.model.layers.1.mlp.up_proj.weight"


def shard(folder: Path) -> None:
    """Turn a checkpoint's one file of weights into two shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    files = ("model-00001-of-00002.safetensors", SHARD)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    for file, half in zip(files, halves, strict=True):
        save_file({name: tensors[name] for name in half}, folder / file, metadata={"format": "pt"})
    where = {name: file for file, half in zip(files, halves, strict=True) for name in half}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    (folder / "model.safetensors").unlink()


def written(name: str, content: bytes) -> Break:
    return lambda folder: (folder / name).write_bytes(content) and None


def cut(name: str, share: float) -> Break:
    def apply(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(share * len(content))])

    return apply


def removed(name: str) -> Break:
    return lambda folder: (folder / name).unlink()


def a_folder(name: str) -> Break:
    def apply(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return apply


def from_other(name: str, other: Path) -> Break:
    return lambda folder: shutil.copyfile(other / name, folder / name) and None


def entry(name: str, value, *keys: str) -> Break:
    """Set an entry of a JSON file, or take it out (...)."""

    def apply(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        place = content
        for key in keys[:-1]:
            place = place[key]
        if value is ...:
            place.pop(keys[-1], None)
        else:
            place[keys[-1]] = value
        (folder / name).write_text(json.dumps(content))

    return apply


def tensors(edit: Callable[[dict], object]) -> Break:
    def apply(folder: Path) -> None:
        for file in folder.glob("*.safetensors"):
            held = load_file(file)
            if UP in held:
                edit(held)
                save_file(held, file, metadata={"format": "pt"})

    return apply


CONFIG = {
    "vision_config": (..., None, {}, [], "clip"),
    "text_config": (..., None, {}, [], "llama"),
    "architectures": (None, [], ["LlavaLlamaForCausalLM"], ["LlavaNextForConditionalGeneration"], "Llava"),
    "model_type": (..., None, "llava_llama", "llava_next", "llama", "nonsense", 5),
    "image_token_index": (..., None, -1, 10**9, "x"),
    "image_seq_length": (..., "x"),
    "vision_feature_layer": (..., None, 99, -99, [1, 99], "x"),
    "vision_feature_select_strategy": (..., None, "half", 3),
    "projector_hidden_act": ("nonsense", None),
    "dtype": ("float99", 3),
}
TEXT = {
    "num_hidden_layers": (0, -1, 3, 99, "x", 2.5, None),
    "hidden_size": (0, 63, 128, "x", None),
    "intermediate_size": (0, 64, "x"),
    "num_attention_heads": (0, 3, 5, "x", None),
    "num_key_value_heads": (3, 0, "x"),
    "vocab_size": (0, 5, 10**4, "x"),
    "hidden_act": ("nonsense", None),
    "max_position_embeddings": (0, "x"),
    "rms_norm_eps": ("x",),
    "model_type": (..., "nonsense", "clip_vision_model"),
    "head_dim": (0, 5, "x"),
    "pad_token_id": (-7, 10**9),
}
VISION = {
    "hidden_size": (0, 33, "x"),
    "num_hidden_layers": (0, 1, 99, "x"),
    "num_attention_heads": (0, 3, "x"),
    "image_size": (0, 7, 65, "x", None),
    "patch_size": (0, 5, "x", None),
    "hidden_act": ("nonsense",),
    "model_type": (..., "nonsense", "siglip_vision_model"),
}
PROCESSOR = {
    "patch_size": (..., 0, 7, "x"),
    "vision_feature_select_strategy": (..., "half", 3),
    "num_additional_image_tokens": (..., 5, "x"),
    "image_token": (..., "", "<picture>"),
    "processor_class": (..., "NonsenseProcessor", "CLIPProcessor"),
    "image_processor": (..., {}, [], None),
}
GENERATION = {
    "eos_token_id": (..., None, -1, 10**9, "x", [1, "x"]),
    "max_length": ("x", -1),
    "temperature": ("x",),
    "repetition_penalty": (1.3, "x"),
}
TEMPLATES = {
    "empty": b"",
    "syntax": b"{% for x in %}",
    "unknown": b"{{ nonsense(messages) }}",
    "raises": b"{{ raise_exception('no') }}",
    "no image": b"{{ messages[0]['role'] }}",
    "not utf-8": b"\xff\xfe\x00",
}


def breaks(other: Path) -> Iterator[tuple[str, Break]]:
    """Yield (name, what breaks a sharded checkpoint); `other`: a checkpoint of another model."""
    for name in JSON_FILES:
        for word, content in (("empty", b""), ("{}", b"{}"), ("[]", b"[]"), ("null", b"null"), ("text", b"hello")):
            yield f"{name} {word}", written(name, content)
        yield f"{name} not utf-8", written(name, b'{"a": "\xff\xfe"}')
        yield f"{name} binary", written(name, bytes(range(256)))
        yield f"{name} cut", cut(name, 0.5)
        yield f"{name} missing", removed(name)
        yield f"{name} a folder", a_folder(name)
        if name != INDEX:
            yield f"{name} another's", from_other(name, other)
    for word, content in (("empty", b""), ("text", b"hello"), ("binary", bytes(range(256)) * 9)):
        yield f"{SHARD} {word}", written(SHARD, content)
    for share in (0.001, 0.5, 0.999):
        yield f"{SHARD} cut at {share}", cut(SHARD, share)
    yield f"{SHARD} missing", removed(SHARD)
    yield f"{SHARD} a folder", a_folder(SHARD)
    yield "a tensor missing", tensors(lambda held: held.pop(UP))
    yield "a tensor of another shape", tensors(lambda held: held.update({UP: held[UP][:-1].clone()}))
    yield "a tensor of another type", tensors(lambda held: held.update({UP: held[UP].to(torch.int32)}))
    yield "a tensor under another name", tensors(lambda held: held.update({UP + "x": held.pop(UP)}))
    yield "index without metadata", entry(INDEX, ..., "metadata")
    yield "index without map", entry(INDEX, ..., "weight_map")
    yield "index names a file that is not there", entry(INDEX, "model-00009.safetensors", "weight_map", UP)
    yield "index names a number", entry(INDEX, 5, "weight_map", UP)
    for file, under, entries in (
        ("config.json", (), CONFIG),
        ("config.json", ("text_config",), TEXT),
        ("config.json", ("vision_config",), VISION),
        ("processor_config.json", (), PROCESSOR),
        ("generation_config.json", (), GENERATION),
    ):
        for key, values in entries.items():
            for value in values:
                said = "without" if value is ... else repr(value)
                yield f"{'.'.join((file, *under, key))} {said}", entry(file, value, *under, key)
    yield "chat_template.jinja missing", removed("chat_template.jinja")
    for word, content in TEMPLATES.items():
        yield f"chat_template.jinja {word}", written("chat_template.jinja", content)
