"""Converts a checkpoint of a foreign layout into a stock LLaVA's folder, one tensor in memory at a time."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from transformers import GenerationConfig, LlavaConfig

from actors.checkpoint.foreign import reading
from actors.checkpoint.intake import COPY, Intake
from actors.checkpoint.layouts import LAYOUTS, Layout
from actors.checkpoint.tensors import iterate_tensors, local_folder, published_name, tensor_shapes, write_tensors
from actors.memory import meta_model
from actors.specs import ModelSpec

ROWS = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")


def convert(source: str, out: Path, revision: str | None = None) -> None:
    """Write the stock LLaVA of a foreign checkpoint (folder or hub id) to `out`, which appears when it is whole.

    The image token gets a row of the vocabulary that no other token has, a new one if there is none. Its values are the
    mean of all rows, so its logit is the mean logit, which is never the largest; its embedding is never read.
    ValueError: no known layout, or a tensor that is missing, unexpected or of another shape.
    """
    with reading(source, "", "check the name and the network, or give a local folder"):
        folder = local_folder(source, revision)
    file = folder / "config.json"
    with reading(file, "", COPY):
        entries = dict(json.loads(file.read_text(encoding="utf-8")))
    layout = LAYOUTS.get(str(entries.get("model_type")))
    if layout is None:
        raise ValueError(
            f"{str(file)!r} is of the model type {entries.get('model_type')!r}, but only {', '.join(LAYOUTS)} can be "
            "converted: give such a checkpoint, or a LLaVA as model.path of the other jobs."
        )
    config = layout.config(entries, file)
    names = match_tensors(folder, config, layout)
    with reading(folder, "its tokenizer cannot be read", COPY):
        processor = layout.processor(folder, entries, config)
    rows = add_image_token(config, processor.tokenizer, folder)
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_tensors(partial, _stock_tensors(folder, names, config.image_token_id, rows))
    config.architectures = ["LlavaForConditionalGeneration"]
    config.save_pretrained(partial)
    tokens = config.text_config
    ids = {name: getattr(tokens, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**ids).save_pretrained(partial)
    processor.save_pretrained(partial)
    Intake().look(ModelSpec(str(partial)))
    partial.rename(out)


def match_tensors(folder: Path, config: LlavaConfig, layout: Layout) -> dict[str, str]:
    """Return the published name of every stored one; ValueError names a tensor that is missing, left over or unlike."""
    wanted = {published_name(name): tuple(part.shape) for name, part in meta_model(config).named_parameters()}
    names: dict[str, str] = {}
    for stored, (shape, file) in tensor_shapes(folder).items():
        name = layout.name(stored)
        if name not in wanted:
            raise ValueError(f"{str(file)!r} holds the tensor {stored!r}, which config.json does not describe: {COPY}.")
        if shape != wanted[name]:
            raise ValueError(
                f"{str(file)!r} holds {stored!r} as {list(shape)}, but config.json says {list(wanted[name])}: {COPY}."
            )
        names[stored] = name
    if missing := sorted(set(wanted) - set(names.values())):
        raise ValueError(
            f"{str(folder)!r} lacks the tensor that a LLaVA calls {missing[0]!r}"
            f"{f', and {len(missing) - 1} more' if len(missing) > 1 else ''}: {COPY}."
        )
    return names


def add_image_token(config: LlavaConfig, tokenizer, folder: Path) -> int:
    """Enter the image token's id into the config; return how many rows it adds to the vocabulary, 0 or 1."""
    text = config.text_config
    config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    rows = config.image_token_id + 1 - text.vocab_size
    if rows > 1:
        raise ValueError(
            f"The tokenizer of {str(folder)!r} has {config.image_token_id} tokens, but config.json says "
            f"{text.vocab_size}: one of them is another model's. {COPY.capitalize()}."
        )
    text.vocab_size += max(rows, 0)
    return max(rows, 0)


def _stock_tensors(
    folder: Path, names: Mapping[str, str], image_token: int, rows: int
) -> Iterator[tuple[str, torch.Tensor]]:
    for stored, tensor in iterate_tensors(folder):
        name = names[stored]
        if name in ROWS:
            mean = tensor.double().mean(0, keepdim=True).to(tensor.dtype)
            tensor = torch.cat([tensor, mean.expand(rows, -1)])
            tensor[image_token] = mean[0]
        yield name, tensor
