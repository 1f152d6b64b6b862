"""What the gate checks in a checkpoint's files: decoder layers, finite values, names, sums, unchanged tensors."""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import torch

from actors.checkpoint.tensors import iterate_tensors, read_tensor, tensor_places
from actors.specs import GateError

PUBLISHED = re.compile(
    r"^(language_model\.(model\.(embed_tokens|norm|final_layernorm|layers\.\d+)\b|lm_head\.)"
    r"|vision_tower\.vision_model\.|multi_modal_projector\.)"
)
LAYER = re.compile(r"language_model\.(?:model\.)?layers\.(\d+)\.(.+)$")
PACKED = re.compile(r"\.weight_(packed|scale|zero_point|shape)$")  # in the compressed-tensors layout
T = TypeVar("T")


def load_or_refuse(load: Callable[[], T]) -> T:
    """Return `load()`; GateError: it raised (libraries raise any exception at files that do not fit)."""
    try:
        return load()
    except Exception as error:
        raise GateError(f"It cannot be loaded: {' '.join(str(error).split())[:400]}") from error


def tensors_of(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every (name, tensor); GateError: no weights, a shard is missing or damaged."""
    try:
        yield from iterate_tensors(folder)
    except ValueError as error:
        raise GateError(str(error)) from None


def check_tensors(folder: Path, config) -> str:
    """Refuse NaN and infinity, and decoder layers that are not 0..n-1, where n is the config's number."""
    layers: dict[int, set[str]] = {}
    count = 0
    for name, tensor in tensors_of(folder):
        count += 1
        if tensor.is_floating_point() and not torch.isfinite(tensor.sum(dtype=torch.float64)):
            raise GateError(f"{name!r} holds NaN or infinity.")
        if match := LAYER.search(name):
            layers.setdefault(int(match[1]), set()).add(PACKED.sub(".weight", match[2]))
    stated = config.text_config.num_hidden_layers
    if sorted(layers) != list(range(stated)):
        odd = min(set(layers) ^ set(range(stated)))
        raise GateError(
            f"config.json says {stated} decoder layers, the files hold {len(layers)}: the first that does not fit is "
            f"'language_model.model.layers.{odd}'. The layers must be renumbered and the count corrected."
        )
    parts = set.union(*layers.values())
    for number in range(stated):
        for part in sorted(parts - layers[number]):
            raise GateError(f"'language_model.model.layers.{number}.{part}' is missing; other decoder layers have it.")
    return f"{count} finite tensors, {stated} decoder layers"


def check_sums(folder: Path, published: Mapping[str, str] | None) -> dict[str, str]:
    """Return the SHA-256 of every tensor's bytes; refuse a tensor whose sum is not the `published` one."""
    sums = {}
    for name, tensor in tensors_of(folder):
        sums[name] = hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()).hexdigest()
    if published is not None:
        for name in sorted(set(published) | set(sums)):
            if published.get(name) != sums.get(name):
                other = next((n for n, s in published.items() if s == sums.get(name)), None)
                state = "missing" if name not in sums else "new" if name not in published else "not what was published"
                raise GateError(f"{name!r} is {state}{f' (it holds {other!r})' if other else ''}.")
    return sums


def check_names(folder: Path) -> str:
    """Refuse tensor names other than those of the published llava-hf checkpoints, which other programs expect."""
    for name, _ in tensors_of(folder):
        if not PUBLISHED.match(name):
            raise GateError(f"{name!r} is not a published llava-hf name: other programs will not find it.")
    return "as published by llava-hf"


def check_kept(folder: Path, before: Path, renumbered: Mapping[int, int], changed: Callable[[str], bool]) -> str:
    """Refuse a tensor that differs from the same tensor of the checkpoint `before`, cast to its own type.

    renumbered: {number before: number now} of the decoder layers that were kept. changed: from a published name to
    whether the tensor may differ. GateError names the first one that does, and the tensor that it holds instead.
    """
    places = tensor_places(before)
    numbers = {now: old for old, now in renumbered.items()}
    same = 0
    for name, tensor in tensors_of(folder):
        if changed(name):
            continue
        match = LAYER.search(name)
        old = f"{name[: match.start(1)]}{numbers[int(match[1])]}{name[match.end(1) :]}" if match else name
        if old not in places:
            raise GateError(f"{name!r} is new: the model before has no {old!r}.")
        if not torch.equal(tensor, read_tensor(*places[old]).to(tensor.dtype)):
            other = next((n for n, place in places.items() if _equal(tensor, read_tensor(*place))), None)
            raise GateError(
                f"{name!r} is not {old!r} of the model before{f' (it holds {other!r})' if other else ''}: "
                "it was changed, swapped or renumbered wrongly."
            )
        same += 1
    return f"{same} tensors are those of the model before"


def _equal(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    return tensor.shape == other.shape and torch.equal(tensor, other.to(tensor.dtype))
