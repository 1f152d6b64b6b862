"""Writing a narrow checkpoint: every decoder layer keeps as many head groups and channels, its most important ones.

config.json describes the result, so that plain transformers loads it.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch
from transformers import MistralConfig

from actors.checkpoint.config import read_config
from actors.checkpoint.loading import language_model, load_model, load_processor, quiet
from actors.checkpoint.tensors import (
    copy_companions,
    iterate_tensors,
    local_folder,
    published_layer,
    published_name,
    write_tensors,
)
from actors.narrowing.groups import Heads, KeptGroups, layer_shape, narrow_tensor, places, removed_groups
from actors.narrowing.scores import InputSums, Layers, score_groups
from actors.specs import Conversation, ModelSpec


def narrow_config(config, width: float, multiple: int):
    """Return a copy of a LLaVA config with the share `width` of every layer's channels and head groups.

    Channels are rounded down to a multiple of `multiple`, head groups to whole ones; one of each stays at least.
    ValueError: the model has fewer channels than `multiple`.
    """
    config = copy.deepcopy(config)
    text = config.text_config
    if multiple > text.intermediate_size:
        raise ValueError(
            f"prune.width keeps a multiple of quantize.group_size ({multiple}) channels; the model has "
            f"{text.intermediate_size}: choose a smaller group_size."
        )
    heads = Heads.of(text)
    text.head_dim = heads.size  # no longer hidden_size / heads
    text.num_key_value_heads = max(1, int(width * heads.groups))
    text.num_attention_heads = heads.queries * text.num_key_value_heads
    text.intermediate_size = max(1, int(width * text.intermediate_size) // multiple) * multiple
    if text.model_type == "llama" and text.hidden_size % text.num_attention_heads:
        config.text_config = _as_mistral(text)
    return config


def _as_mistral(text) -> MistralConfig:
    """Return a Llama's config as a Mistral's without a window, which computes the same from the same tensors.

    transformers refuses a Llama whose heads do not divide its width, whatever head_dim says. ValueError: it has biases.
    """
    if text.attention_bias or text.mlp_bias:
        raise ValueError(
            f"prune.width leaves {text.num_attention_heads} heads, which do not divide the width {text.hidden_size}: "
            "transformers refuses that in a Llama with biases. Choose another prune.width."
        )
    names = {field.name for field in fields(MistralConfig)} - {"model_type", "sliding_window"}
    values = {name: value for name, value in text.to_dict().items() if name in names}
    return MistralConfig(**values, sliding_window=None)


def choose_groups(scores: Layers, heads: int, channels: int) -> KeptGroups:
    """Return the best `heads` head groups and `channels` channels of every layer; of equals, the first."""

    def best(values: torch.Tensor, count: int) -> list[int]:
        return sorted(torch.sort(values, descending=True, stable=True).indices[:count].tolist())

    kept = [(best(layer[0], heads), best(layer[1], channels)) for layer in scores]
    return KeptGroups(np.array([pair[0] for pair in kept], np.int32), np.array([pair[1] for pair in kept], np.int32))


class Narrower:
    """A worker that holds the model to narrow."""

    def __init__(self, spec: ModelSpec):
        quiet()
        self._spec, self._source = spec, local_folder(spec.path, spec.revision)
        self._config = read_config(self._source, trust_remote_code=spec.trust_remote_code)
        if getattr(self._config, "quantization_config", None):
            raise ValueError(f"{spec.path!r} is quantized: prune the original, then quantize.")
        layer_shape(self._config.text_config)
        self._model = load_model(**spec.loading)
        self._processor = load_processor(spec.path, spec.revision, spec.trust_remote_code)

    def narrow(
        self,
        conversations: Sequence[Conversation],
        width: float,
        multiple: int,
        criterion: str,
        seed: int,
        out: str,
    ) -> dict:
        """Write the narrow checkpoint to `out`; criterion: a name of actors.narrowing.scores.CRITERIA.

        Returns {head_groups, channels: how many every layer has now; compensated: whether the mean contribution of the
        removed groups was added to biases (FLAP), which needs output linears with biases}.
        """
        narrow = narrow_config(self._config, width, multiple)
        text = narrow.text_config
        scores, inputs = score_groups(criterion, self._model, self._processor, conversations, seed)
        kept = choose_groups(scores, text.num_key_value_heads, text.intermediate_size)
        target = Path(out)
        copy_companions(self._source, target)
        narrow.save_pretrained(target)
        extra = self._compensation(kept, inputs)
        kept = replace(kept, biases={name: added.numpy() for name, added in extra.items()})
        kept.write(target)
        write_tensors(target, self._tensors(kept, extra))
        return {
            "head_groups": text.num_key_value_heads,
            "channels": text.intermediate_size,
            "compensated": bool(extra),
        }

    def _tensors(self, kept: KeptGroups, extra: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        for stored, tensor in iterate_tensors(self._source):
            name = published_name(stored)
            if place := published_layer(name):
                number, part = place
                tensor = narrow_tensor(
                    part, tensor, kept.heads[number], kept.channels[number], self._config.text_config
                )
            if name in extra:
                tensor = (tensor.double() + extra[name]).to(tensor.dtype)
            yield name, tensor

    def _compensation(self, kept: KeptGroups, inputs: InputSums) -> dict[str, torch.Tensor]:
        """Return what to add to the output linears' biases: the mean contribution of the removed groups."""
        text = self._config.text_config
        shape, heads = layer_shape(text), Heads.of(text)
        extra = {}
        for number, layer in enumerate(language_model(self._model).layers):
            removed_channels = removed_groups(kept.channels[number], text.intermediate_size)
            removed_heads = places(removed_groups(kept.heads[number], heads.groups), heads.queries * heads.size)
            for name, removed in (
                (shape.out, removed_heads),
                (shape.down, torch.tensor(removed_channels, dtype=torch.long)),
            ):
                linear = layer.get_submodule(name)
                if linear.bias is not None:
                    weight = linear.weight.detach().double().cpu()[:, removed]
                    mean = inputs.mean(number, name)[removed]
                    extra[f"language_model.model.layers.{number}.{name}.bias"] = weight @ mean
        return extra
