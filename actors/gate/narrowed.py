"""What the gate checks of a narrow checkpoint: every tensor is the part of the one before that its record says."""

import torch
from torch import nn

from actors.checkpoint.config import read_config
from actors.checkpoint.tensors import local_folder, read_tensor, tensor_places
from actors.gate.files import LAYER, load_or_refuse, tensors_of
from actors.narrowing.groups import FILE, Heads, KeptGroups, layer_shape, mask_layer, narrow_tensor
from actors.specs import GateError, ModelSpec


class Narrowed:
    """A narrow checkpoint in `folder`, made from `parent`; GateError: it has no record of what it kept."""

    def __init__(self, folder, parent: ModelSpec):
        self._folder, self._before = folder, local_folder(parent.path, parent.revision)
        self._text = read_config(self._before, trust_remote_code=parent.trust_remote_code).text_config
        shape, heads = layer_shape(self._text), Heads.of(self._text)
        self._biases = tuple(f"{name}.bias" for name in (shape.out, shape.down))  # may be compensated
        self._kept = load_or_refuse(lambda: KeptGroups.read(folder))
        for numbers, count in (
            (self._kept.heads, heads.groups),
            (self._kept.channels, self._text.intermediate_size),
        ):
            wrong = numbers.ndim != 2 or len(numbers) != self._text.num_hidden_layers or numbers.min() < 0
            if wrong or numbers.max() >= count or (numbers[:, 1:] <= numbers[:, :-1]).any():
                raise GateError(f"{FILE!r} does not say for every layer which of its {count} groups are left.")

    def check_tensors(self) -> str:
        """Refuse a tensor that is not the recorded part of the one in the model before."""
        places = tensor_places(self._before)
        for name, tensor in tensors_of(self._folder):
            if name not in places:
                raise GateError(f"The model before has no tensor {name!r}.")
            expected = read_tensor(*places[name])
            if match := LAYER.search(name):
                number = int(match[1])
                heads, channels = self._kept.heads[number], self._kept.channels[number]
                expected = narrow_tensor(match[2], expected, heads, channels, self._text)
            if name in self._kept.biases:
                added = torch.from_numpy(self._kept.biases[name])
                expected = (expected.double() + added).to(tensor.dtype)
            if tensor.shape != expected.shape or not torch.equal(tensor, expected.to(tensor.dtype)):
                raise GateError(f"{name!r} is not the part of the tensor before that {FILE} says.")
        return f"every tensor is the part that {FILE} says of the model before"

    def mask(self, number: int, layer: nn.Module) -> None:
        """Mask the removed groups in a layer of the model before, and give it the narrow layer's biases."""
        mask_layer(layer, self._kept.heads[number], self._kept.channels[number], self._text)
        places = tensor_places(self._folder)
        for name in self._biases:
            linear = layer.get_submodule(name.removesuffix(".bias"))
            if linear.bias is not None:
                now = read_tensor(*places[f"language_model.model.layers.{number}.{name}"])
                linear.bias.data.copy_(now.to(linear.bias))
