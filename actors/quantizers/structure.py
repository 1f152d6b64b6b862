"""What the quantizers know about decoder layers: the linears, which of them share a scale, and what is refused."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel

from actors.checkpoint.config import building, check_llava, read_config
from actors.checkpoint.tensors import local_folder
from actors.quantizers.table import METHODS, SIMULATED, find_method, load_function
from actors.specs import Llava, ModelSpec, QuantizeSettings

NEVER_CLIPPED = ("self_attn.q_proj", "self_attn.k_proj")  # only their outputs' product matters
CLIP_BLOCK = 64  # autoawq walks outputs in blocks of 64 to clip


@dataclass(frozen=True)
class ScalingGroup:
    """Linears that share an input: the module `before` divides it by s, and their columns are multiplied by s."""

    before: str
    linears: tuple[str, ...]
    inspected: tuple[str, ...]  # the modules that take this input; the error of their summed output rates a scale


_QKV = tuple(f"self_attn.{part}_proj" for part in "qkv")
_GATED = (
    ScalingGroup("input_layernorm", _QKV, ("self_attn",)),
    ScalingGroup("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"), ("mlp",)),
    ScalingGroup("mlp.up_proj", ("mlp.down_proj",), ("mlp.down_proj",)),
    ScalingGroup("self_attn.v_proj", ("self_attn.o_proj",), ("self_attn.o_proj",)),
)
# Attention and MLP read one norm and are added. No scale passes the GELU between fc1 and fc2: fc2 is only clipped.
_PARALLEL = (
    ScalingGroup("input_layernorm", (*_QKV, "mlp.fc1"), ("self_attn", "mlp")),
    ScalingGroup("self_attn.v_proj", ("self_attn.dense",), ("self_attn.dense",)),
)
AWQ_GROUPS = {"llama": _GATED, "mistral": _GATED, "qwen2": _GATED, "phi": _PARALLEL}  # by the text model's type


def scaling_groups(layer: nn.Module) -> list[ScalingGroup]:
    """List the scaling groups of one decoder layer of a type in AWQ_GROUPS.

    A group is left out if `before` has fewer outputs than its linears have inputs: with grouped-query attention, where
    one output of v feeds several inputs of o.
    """

    def width(name: str, axis: int) -> int:
        return layer.get_submodule(name).weight.shape[axis]

    groups = AWQ_GROUPS[layer.self_attn.config.model_type]
    return [group for group in groups if width(group.before, 0) == width(group.linears[0], 1)]


def empty_decoder(config) -> Llava:
    """Return the decoder that a LLaVA config describes, without weights (on the meta device)."""
    with building(config), torch.device("meta"):
        return AutoModel.from_config(config.text_config, attn_implementation="sdpa").eval()


def linear_shapes(config) -> dict[str, tuple[int, int]]:
    """Return the linears of one decoder layer of a LLaVA config: name -> (outputs, inputs)."""
    with building(config):
        layer = empty_decoder(config).layers[0]
    return {name: tuple(m.weight.shape) for name, m in layer.named_modules() if isinstance(m, nn.Linear)}


def open_checkpoint(spec: ModelSpec, settings: QuantizeSettings) -> tuple[Path, Any]:
    """Return a checkpoint's folder and its config; ValueError: the method cannot round this model."""
    source = local_folder(spec.path, spec.revision)
    config = read_config(source, trust_remote_code=spec.trust_remote_code)
    check_quantizable(config, settings)
    return source, config


def check_quantizable(config, settings: QuantizeSettings) -> None:
    """Refuse a checkpoint that the method cannot round, by its config alone.

    ValueError: not a LLaVA's config, quantized already, decoder layers that awq does not support, or linears whose
    inputs the group size does not divide.
    """
    check_llava(config)
    if getattr(config, "quantization_config", None) or getattr(config, SIMULATED, None):
        raise ValueError("The checkpoint is quantized already: quantize the original.")
    method = find_method(settings.method)
    if method.groups:
        for name, (_, inputs) in linear_shapes(config).items():
            if inputs % settings.group_size:
                raise ValueError(
                    f"{settings.method} cannot round {name} of {inputs} inputs in groups of {settings.group_size}: "
                    "choose a quantize.group_size that divides it, or a prune.width that leaves a multiple of it."
                )
    if method.check:
        load_function(method.check)(config, settings)


def check_awq(config, settings: QuantizeSettings) -> None:
    """Refuse decoder layers that AWQ does not support, or whose linears autoawq cannot clip (ValueError)."""
    kind, search = config.text_config.model_type, settings.awq_search
    if kind not in AWQ_GROUPS:
        raise ValueError(
            f"awq does not support the decoder layers of {kind!r} (only of {', '.join(AWQ_GROUPS)}): "
            f"choose --quantize.method {', '.join(name for name in METHODS if name != settings.method)}."
        )
    if search == "autoawq" and any(len(group.inspected) > 1 for group in AWQ_GROUPS[kind]):
        raise ValueError(
            f"autoawq does not support the decoder layers of {kind!r}, whose attention and MLP share an input: "
            "choose the built-in search, --quantize.awq_search layerwise."
        )
    if search == "layerwise" or not settings.clip:
        return
    for name, (outputs, _) in linear_shapes(config).items():
        if name not in NEVER_CLIPPED and outputs % CLIP_BLOCK:
            raise ValueError(
                f"autoawq cannot clip {name} of {outputs} outputs, which {CLIP_BLOCK} does not divide: "
                "set quantize.awq_search to layerwise, or quantize.clip to false."
            )


def weight_bits(config, stored: int) -> int:
    """Return the bits of the decoder's weights by a checkpoint's config; `stored` if they are not rounded.

    Where the layers' bits differ: the fewest.
    """
    rounded = getattr(config, "quantization_config", None) or getattr(config, SIMULATED, None)
    if not rounded:
        return stored
    settings = rounded if isinstance(rounded, dict) else rounded.to_dict()
    if groups := settings.get("config_groups"):
        return min(group["weights"]["num_bits"] for group in groups.values())
    return settings.get("bits") or (8 if settings.get("load_in_8bit") else 4)
