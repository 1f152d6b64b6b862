"""Two pretended GPUs: every tensor has a place, and an operation on tensors of two places is an error, as on GPUs.

The numbers are computed on the CPU. What the mode pretends is where they are: `.device`, `.to`, factory functions with
`device=`, and the refusal to mix. Tensors made without a device are on the CPU, and CPU tensors do not mix with others
either, except single numbers.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

CPU = torch.device("cpu")
_READS = {"numel", "dim", "size", "stride", "__len__", "__get__", "is_floating_point", "__repr__", "element_size"}


class Places(TorchFunctionMode):
    """While active, tensors have places; `moves` counts the tensors that were taken from one to another."""

    def __init__(self):
        super().__init__()
        self._where = WeakTensorKeyDictionary()
        self.moves = 0

    def of(self, tensor: torch.Tensor) -> torch.device:
        """Return where a tensor is."""
        return self._where.get(tensor, CPU)

    def put(self, module: nn.Module, place: torch.device) -> None:
        """Say that a module's parameters and buffers are at a place, and that its inputs are taken there (a hook)."""
        for tensor in [*module.parameters(), *module.buffers()]:
            self._where[tensor] = place
        module.register_forward_pre_hook(lambda _, args, kwargs: self._moved((args, kwargs), place), with_kwargs=True)

    def _moved(self, items, place: torch.device):
        if isinstance(items, torch.Tensor):
            return items.to(place)
        if isinstance(items, dict):
            return {key: self._moved(item, place) for key, item in items.items()}
        return type(items)(self._moved(item, place) for item in items) if isinstance(items, tuple | list) else items

    def __torch_function__(self, function, types, args=(), kwargs=None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(function, "__name__", "")
        found = list(_tensors((args, kwargs)))
        if name == "__get__":
            if function == torch.Tensor.device.__get__:
                return self.of(args[0])
            return self._marked(function(*args, **kwargs), self.of(args[0]))
        if name in _READS:
            return function(*args, **kwargs)
        wanted = self._wanted(function, name, args, kwargs)
        if name in ("to", "cpu"):
            return self._taken(args, kwargs, CPU if name == "cpu" else wanted)
        places = {self.of(tensor) for tensor in found if tensor.dim() or self.of(tensor) != CPU}
        if len(places) > 1:
            raise RuntimeError(f"{name}: tensors on {sorted(map(str, places))}")
        place = wanted or next(iter(places), CPU)
        return self._marked(function(*args, **kwargs), place)

    def _wanted(self, function, name: str, args, kwargs) -> torch.device | None:
        place = kwargs.pop("device", None)
        if name == "to" and place is None:
            place = next((a for a in args[1:] if isinstance(a, torch.device | str)), None)
            place = next((self.of(a) for a in args[1:] if isinstance(a, torch.Tensor)), place)
        return torch.device(place) if place is not None else None

    def _taken(self, args, kwargs, place: torch.device | None):
        tensor = args[0]
        rest = [a for a in args[1:] if not isinstance(a, torch.device | str)]
        rest = [a.dtype if isinstance(a, torch.Tensor) else a for a in rest]
        made = tensor.to(*rest, **kwargs) if rest or kwargs else tensor
        if place is None or place == self.of(tensor):
            return self._marked(made, self.of(tensor))
        self.moves += 1
        return self._marked(made.clone(), place)

    def _marked(self, made, place: torch.device):
        for tensor in _tensors(made):
            self._where[tensor] = place
        return made


def _tensors(items) -> Iterator[torch.Tensor]:
    if isinstance(items, torch.Tensor):
        yield items
    elif isinstance(items, dict):
        yield from _tensors(list(items.values()))
    elif isinstance(items, tuple | list):
        for item in items:
            yield from _tensors(item)


def spread(model, places: Places, devices: Sequence[torch.device]):
    """Return a copy of a LLaVA with its layers dealt out over devices in order, its eyes far from its embeddings."""
    model = copy.deepcopy(model)
    decoder, layers = model.model.language_model, model.model.language_model.layers
    for number, layer in enumerate(layers):
        places.put(layer, devices[number * len(devices) // len(layers)])
    for eyes in (model.model.vision_tower, model.model.multi_modal_projector):
        places.put(eyes, devices[-1])
    for name, part in decoder.named_children():
        if name != "layers":  # what is left is the final norm, under one name or another
            places.put(part, devices[0 if name in ("embed_tokens", "rotary_emb") else -1])
    tied = model.lm_head.weight is decoder.embed_tokens.weight
    places.put(model.lm_head, devices[0 if tied else -1])
    return model
