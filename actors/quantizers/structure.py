"""What the quantizers know of a decoder layer: its linears, which of them share a scale, and what must be refused."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from actors.specs import Llava, ModelSpec, QuantizeSettings
from actors.surgery import check_llava, local_folder

# Decoder layers with RMS norms, a gated MLP, and names as below: what the scaling groups were written for.
AWQ_LAYERS = ("llama", "mistral", "qwen2")
NEVER_CLIPPED = ("self_attn.q_proj", "self_attn.k_proj")  # their product is what counts, not their outputs
CLIP_BLOCK = 64  # autoawq walks outputs in blocks of 64 to clip
SIMULATED = "simulated_quantization"  # the config.json entry of a checkpoint that holds rounded weights in 16 bits


@dataclass(frozen=True)
class ScalingGroup:
    """Linears that share an input: it is divided by s in what comes before, and their columns are multiplied by s."""

    before: str
    linears: tuple[str, ...]
    inspected: str  # the module whose output tells how good a scale is


def scaling_groups(layer: nn.Module) -> list[ScalingGroup]:
    """List one decoder layer's groups: input norm -> q, k, v; norm -> gate, up; up -> down; v -> o."""
    attention, mlp = "self_attn", "mlp"
    groups = [
        ScalingGroup("input_layernorm", tuple(f"{attention}.{part}_proj" for part in "qkv"), attention),
        ScalingGroup("post_attention_layernorm", (f"{mlp}.gate_proj", f"{mlp}.up_proj"), mlp),
        ScalingGroup(f"{mlp}.up_proj", (f"{mlp}.down_proj",), f"{mlp}.down_proj"),
    ]
    v, o = (layer.get_submodule(f"{attention}.{part}_proj") for part in "vo")
    if v.weight.shape == o.weight.shape:  # with grouped-query attention one row of v feeds several columns of o
        groups.append(ScalingGroup(f"{attention}.v_proj", (f"{attention}.o_proj",), f"{attention}.o_proj"))
    return groups


def empty_decoder(config) -> Llava:
    """Return the decoder that a LLaVA config describes, without weights (on the meta device)."""
    with torch.device("meta"):
        return AutoModel.from_config(config.text_config, attn_implementation="sdpa").eval()


def linear_shapes(config) -> dict[str, tuple[int, int]]:
    """Return the linears of one decoder layer of a LLaVA config: name -> (outputs, inputs)."""
    layer = empty_decoder(config).layers[0]
    return {name: tuple(m.weight.shape) for name, m in layer.named_modules() if isinstance(m, nn.Linear)}


def opened(spec: ModelSpec, settings: QuantizeSettings) -> tuple[Path, Any]:
    """Return a checkpoint's folder and its config; ValueError: the method cannot do this."""
    source = local_folder(spec.path, spec.revision)
    config = AutoConfig.from_pretrained(source, trust_remote_code=spec.trust_remote_code)
    check_quantizable(config, settings)
    return source, config


def check_quantizable(config, settings: QuantizeSettings) -> None:
    """Refuse, from a LLaVA checkpoint's config alone, what the method cannot do.

    ValueError: no LLaVA's config, quantized already, a decoder layer that awq does not know, or a linear's size that
    does not divide.
    """
    check_llava(config)
    if getattr(config, "quantization_config", None) or getattr(config, SIMULATED, None):
        raise ValueError("The checkpoint is quantized already: quantize the original.")
    kind = config.text_config.model_type
    if settings.method == "awq" and kind not in AWQ_LAYERS:
        raise ValueError(
            f"awq does not know the decoder layers of {kind!r} (only of {', '.join(AWQ_LAYERS)}): "
            "choose --quantize.method nf4, int8, hqq or rtn."
        )
    if settings.method in ("nf4", "int8"):
        return
    for name, (outputs, inputs) in linear_shapes(config).items():
        if inputs % settings.group_size:
            raise ValueError(
                f"{settings.method} cannot round {name} of {inputs} inputs in groups of {settings.group_size}: "
                "choose a quantize.group_size that divides it."
            )
        clips = settings.method == "awq" and settings.awq_search == "autoawq" and settings.clip
        if clips and name not in NEVER_CLIPPED and outputs % CLIP_BLOCK:
            raise ValueError(
                f"autoawq cannot clip {name} of {outputs} outputs, which {CLIP_BLOCK} does not divide: "
                "set quantize.awq_search to layerwise, or quantize.clip to false."
            )


def weight_bits(config, stored: int) -> int:
    """Return the bits of the decoder's weights that a checkpoint's config tells; `stored` if they are not rounded.

    Where layers have bits of their own: the fewest.
    """
    rounded = getattr(config, "quantization_config", None) or getattr(config, SIMULATED, None)
    if not rounded:
        return stored
    given = rounded if isinstance(rounded, dict) else rounded.to_dict()
    if groups := given.get("config_groups"):
        return min(group["weights"]["num_bits"] for group in groups.values())
    return given.get("bits") or (8 if given.get("load_in_8bit") else 4)
