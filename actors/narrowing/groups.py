"""Coupled groups of a decoder layer: what must be removed together with a head or an MLP channel.

A head group is one key/value head with all query heads that read it: its rows of q, k and v, its columns of the output
projection. A channel is a row of the linears that read the layer's input, and a column of the one that writes.
Axes: G head groups, C channels of one layer.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.specs import Llava

FILE = "width.npz"  # beside a narrow checkpoint: which groups of the model before it has


@dataclass(frozen=True)
class LayerShape:
    """The names of the linears in a decoder layer: attention's output, the MLP's inputs, the MLP's output."""

    out: str
    reads: tuple[str, ...]
    down: str


_GATED = LayerShape("self_attn.o_proj", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj")
SHAPES = {"llama": _GATED, "mistral": _GATED, "qwen2": _GATED}
SHAPES["phi"] = LayerShape("self_attn.dense", ("mlp.fc1",), "mlp.fc2")
QUERY, KEY_VALUE = "self_attn.q_proj", ("self_attn.k_proj", "self_attn.v_proj")


@dataclass(frozen=True)
class Heads:
    """The attention of a text config. groups: key/value heads; queries: query heads of each; size: channels of one."""

    groups: int
    queries: int
    size: int

    @classmethod
    def of(cls, text) -> "Heads":
        """Return what a text config states."""
        groups = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return cls(groups, text.num_attention_heads // groups, size)


@dataclass(frozen=True)
class KeptGroups:
    """The groups of every layer that stay, sorted: head groups [L, G'] and channels [L, C'], by their old numbers.

    biases: what was added to biases, by the tensor's name.
    """

    heads: np.ndarray
    channels: np.ndarray
    biases: Mapping[str, np.ndarray] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write FILE into a checkpoint's folder."""
        arrays: dict[str, Any] = {"heads": self.heads, "channels": self.channels, **self.biases}
        np.savez_compressed(folder / FILE, **arrays)

    @classmethod
    def read(cls, folder: Path) -> "KeptGroups":
        """Return what FILE holds."""
        with np.load(folder / FILE, allow_pickle=False) as file:
            biases = {name: file[name] for name in file.files if name not in ("heads", "channels")}
            return cls(file["heads"], file["channels"], biases)


def layer_shape(text) -> LayerShape:
    """Return the names of a text config's linears; ValueError: layers of this type cannot be narrowed."""
    if text.model_type not in SHAPES:
        raise ValueError(
            f"prune.width: decoder layers of {text.model_type!r} cannot be narrowed, only those of {', '.join(SHAPES)}."
        )
    return SHAPES[text.model_type]


def narrow_tensor(name: str, tensor: torch.Tensor, heads: Sequence[int], channels: Sequence[int], text) -> torch.Tensor:
    """Return the part of a layer's tensor that is kept. name: as in the layer, e.g. self_attn.q_proj.weight."""
    shape, attention = layer_shape(text), Heads.of(text)
    linear, _, kind = name.rpartition(".")
    if linear == QUERY:
        return tensor[places(heads, attention.queries * attention.size)]
    if linear in KEY_VALUE:
        return tensor[places(heads, attention.size)]
    if linear in shape.reads:
        return tensor[torch.as_tensor(channels)]
    if kind == "weight" and linear == shape.out:
        return tensor[:, places(heads, attention.queries * attention.size)]
    if kind == "weight" and linear == shape.down:
        return tensor[:, torch.as_tensor(channels)]
    return tensor


def places(groups: Sequence[int], size: int) -> torch.Tensor:
    """Return the places of groups of `size` neighbours each."""
    return (torch.as_tensor(groups)[:, None] * size + torch.arange(size)).flatten()


def removed_groups(kept: Sequence[int], count: int) -> list[int]:
    """Return the numbers below `count` that are not kept."""
    return sorted(set(range(count)) - {int(each) for each in kept})


def mask_layer(layer: Llava, heads: Sequence[int], channels: Sequence[int], text) -> None:
    """Zero the columns that read removed groups: the whole layer then computes what the narrow one computes."""
    shape, attention = layer_shape(text), Heads.of(text)
    out, down = layer.get_submodule(shape.out).weight, layer.get_submodule(shape.down).weight
    with torch.no_grad():
        if removed := removed_groups(heads, attention.groups):
            out[:, places(removed, attention.queries * attention.size).to(out.device)] = 0
        if removed := removed_groups(channels, down.shape[1]):
            down[:, torch.tensor(removed, device=down.device)] = 0


def group_sums(linears: Mapping[str, tuple[torch.Tensor, torch.Tensor]], text) -> Iterator[torch.Tensor]:
    """Yield the scores of a layer's head groups [G] and channels [C] from scores of its weights' rows and columns.

    linears: (rows [out], columns [in]) of each linear, its bias counted in the rows.
    """
    shape, attention = layer_shape(text), Heads.of(text)
    rows = {name: pair[0] for name, pair in linears.items()}
    query = rows[QUERY] + linears[shape.out][1]
    yield query.view(attention.groups, -1).sum(1) + sum(
        rows[name].view(attention.groups, -1).sum(1) for name in KEY_VALUE
    )
    yield linears[shape.down][1] + sum(rows[name] for name in shape.reads)
