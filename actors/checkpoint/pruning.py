"""Removing decoder layers from a checkpoint's files, tensor by tensor, without building the model."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from actors.checkpoint.config import read_config
from actors.checkpoint.tensors import copy_companions, iterate_tensors, local_folder, write_tensors

# language_model.model.layers.3.mlp... (published names) or model.language_model.layers.3.mlp... (transformers 5)
_LAYER = re.compile(r"^(.*\blanguage_model\.(?:model\.)?layers\.)(\d+)(\..+)$")


def check_removal(removed: Sequence[int], layers: int) -> list[int]:
    """Return the removed layers, sorted; ValueError if one is out of range or twice, or none would be left."""
    for layer in removed:
        if not 0 <= layer < layers:
            raise ValueError(f"Layer {layer} cannot be removed: the model has layers 0 to {layers - 1}.")
    if len(set(removed)) != len(removed):
        raise ValueError(f"The removal list {list(removed)} names a layer twice.")
    if len(removed) >= layers:
        raise ValueError(f"Cannot remove {len(removed)} layers: the model has {layers}, and at least one must stay.")
    return sorted(removed)


def renumbering(removed: Sequence[int], layers: int) -> dict[int, int]:
    """Return {number before: number after} of the layers that stay."""
    return {old: new for new, old in enumerate(i for i in range(layers) if i not in set(removed))}


def pruned_config(config, removed: Sequence[int]):
    """Drop layers from a LLaVA config (in place): their count, and per-layer settings such as layer_types."""
    text = config.text_config
    removed = check_removal(removed, text.num_hidden_layers)
    keep = [i for i in range(text.num_hidden_layers) if i not in removed]
    if getattr(text, "layer_types", None):
        text.layer_types = [text.layer_types[i] for i in keep]
    if getattr(text, "max_window_layers", None) is not None:
        text.max_window_layers = sum(i < text.max_window_layers for i in keep)
    text.num_hidden_layers = len(keep)
    return config


def prune_checkpoint(path: str, out: str, removed: Sequence[int], revision: str | None = None) -> dict:
    """Write the checkpoint at `path` without the decoder layers `removed` (zero-based) to the folder `out`.

    The other layers are renumbered; names and stored type of every other tensor are kept. Returns
    {removed, layers (left)}. ValueError: a layer is out of range, none is left, or the files disagree with the config.
    """
    source, target = local_folder(path, revision), Path(out)
    config = read_config(source)
    if getattr(config, "quantization_config", None):
        raise ValueError(f"{path!r} is quantized: prune the original, then quantize.")
    before = config.text_config.num_hidden_layers
    removed = check_removal(removed, before)
    renumbered = renumbering(removed, before)
    copy_companions(source, target)
    pruned_config(config, removed).save_pretrained(target)
    seen: set[int] = set()

    def iterate_kept() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in iterate_tensors(source):
            match = _LAYER.match(name)
            if match is None:
                yield name, tensor
                continue
            number = int(match[2])
            seen.add(number)
            if number in renumbered:
                yield f"{match[1]}{renumbered[number]}{match[3]}", tensor

    write_tensors(target, iterate_kept())
    if seen != set(range(before)):
        raise ValueError(
            f"{path!r} holds tensors of {len(seen)} decoder layers but its config.json says {before}: "
            "the checkpoint is incomplete or its names are not those of a LLaVA."
        )
    return {"removed": removed, "layers": len(renumbered)}


class Surgeon:
    """`prune_checkpoint` as a worker class."""

    def prune(self, path: str, out: str, removed: Sequence[int], revision: str | None = None) -> dict:
        """See `prune_checkpoint`."""
        return prune_checkpoint(path, out, removed, revision)
