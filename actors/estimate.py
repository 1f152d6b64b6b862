"""Estimates a setting's memory before anything is loaded: parameters, weights, keys and values, working memory.

A setting gives every decoder layer its bits, 0 for a removed one. Shapes come from the model's config on the meta
device; formulas from actors.maths.sizes. The peak is the largest of three moments: the vision tower's forward pass,
the prefill in the decoder's last layer, the answer's last token.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from actors.checkpoint.config import check_llava
from actors.engine.switch import attention_windows
from actors.maths.sizes import (
    cached_tokens,
    largest_share,
    logit_bytes,
    mlp_copies,
    prefill_bytes,
    tower_bytes,
)
from actors.memory import cached_bytes, meta_model
from actors.quantizers.table import COMPRESSED_TENSORS, SIMULATED, Layout, find_method

TEXT_TOKENS = 64  # of a question and the chat template around it
_LAYER = re.compile(r"\blanguage_model\.layers\.(\d+)\.")
_PARTS = {"vision_tower.": "vision_tower", "multi_modal_projector.": "projector", ".embed_tokens.": "embeddings"}


@dataclass(frozen=True)
class Setting:
    """A setting to estimate.

    bits: one entry per decoder layer of the original (0: removed, 16: not rounded). method: the quantizer of the other
    layers ("none": no quantizer; "mixed": the bits differ between layers, stored as COMPRESSED_TENSORS). context:
    tokens of one prompt with its images (None: the images' tokens and TEXT_TOKENS). decode_tokens: longest answer.
    batch: rows. images: per row. dtype_bytes: bytes of an activation, and of a weight that is not rounded. devices:
    GPUs over which the model is spread.
    """

    bits: tuple[int, ...]
    method: str
    group_size: int
    batch: int
    images: int
    context: int | None
    decode_tokens: int
    dtype_bytes: int
    devices: int

    @property
    def layout(self) -> Layout | None:
        """How the rounded weights are stored; None where none are rounded. ValueError: no such quantizer."""
        if self.method == "none":
            return None
        return COMPRESSED_TENSORS if self.method == "mixed" else find_method(self.method, "none, ").layout

    @property
    def rounded_bits(self) -> tuple[int, ...]:
        """The bits to which the method rounds a layer."""
        if self.method == "none":
            return ()
        return COMPRESSED_TENSORS.bits if self.method == "mixed" else find_method(self.method, "none, ").bits


@dataclass(frozen=True)
class Layer:
    """One decoder layer: its linears' (outputs, inputs), its other parameters, its sliding window (tokens)."""

    linears: tuple[tuple[int, int], ...]
    others: int
    window: int | None

    @property
    def params(self) -> int:
        """All of its parameters."""
        return self.others + sum(outputs * inputs for outputs, inputs in self.linears)


@dataclass(frozen=True)
class Architecture:
    """A model's shapes. parts: parameters of vision_tower, projector, embeddings, head (with the final norm)."""

    config: Any
    parts: dict[str, int]
    layers: tuple[Layer, ...]

    @property
    def patches(self) -> int:
        """Patches of one image."""
        vision = self.config.vision_config
        return (vision.image_size // vision.patch_size) ** 2

    @property
    def tower_tokens(self) -> int:
        """Tokens of one image inside the tower: a CLIP tower adds a class token."""
        return self.patches + ("clip" in self.config.vision_config.model_type)

    @property
    def image_tokens(self) -> int:
        """Tokens of one image in a prompt."""
        full = self.config.vision_feature_select_strategy == "full"
        return self.tower_tokens if full else self.patches


def uniform(layers: int, removed: Sequence[int], bits: int) -> tuple[int, ...]:
    """Return a setting's bits for `layers` decoder layers: 0 for those removed, `bits` for the others."""
    return tuple(0 if layer in removed else bits for layer in range(layers))


def architecture(config, trust_remote_code: bool = False) -> Architecture:
    """Return the shapes that a LLaVA config describes; ValueError: it is not a LLaVA's, or a quantized model's."""
    check_llava(config)
    if getattr(config, "quantization_config", None) or getattr(config, SIMULATED, None):
        raise ValueError("The config.json is a quantized checkpoint's: give the original checkpoint and a quantizer.")
    windows = attention_windows(config.text_config)
    parts = dict.fromkeys((*_PARTS.values(), "head"), 0)
    linears: list[list[tuple[int, int]]] = [[] for _ in windows]
    others = [0] * len(windows)
    for name, parameter in meta_model(config, trust_remote_code).named_parameters():
        if match := _LAYER.search(name):
            number = int(match[1])
            if parameter.dim() == 2:
                linears[number].append((parameter.shape[0], parameter.shape[1]))
            else:
                others[number] += parameter.numel()
            continue
        named = [part for key, part in _PARTS.items() if key in name and (part != "embeddings" or "language" in name)]
        parts[named[0] if named else "head"] += parameter.numel()
    layers = tuple(Layer(tuple(lin), rest, w) for lin, rest, w in zip(linears, others, windows, strict=True))
    return Architecture(config, parts, layers)


def estimate(config: Any, setting: Setting) -> dict:
    """Return the bytes of a setting on the model of a LLaVA config, or of its `Architecture` (for many settings).

    {params (before rounding), weight_bytes, kv_cache_bytes (at the answer's end), activation_bytes (the peak beyond
    these two), total_bytes (the sum of the three), parts (weight bytes of each), phases (bytes beyond the weights:
    vision, prefill, decode), workspace_bytes (to dequantize one linear's weight), device_bytes (of the fullest
    device), context, simulated}. ValueError: the setting does not fit the model.
    """
    shapes = config if isinstance(config, Architecture) else architecture(config)
    context = _check_setting(shapes, setting)
    present = [(layer, bits) for layer, bits in zip(shapes.layers, setting.bits, strict=True) if bits]
    size = setting.dtype_bytes
    layers = [layer_bytes(layer, bits, setting) for layer, bits in present]
    parts = {name: size * count for name, count in shapes.parts.items()}
    caches = [cache_bytes(shapes, layer, setting, context) for layer, _ in present]
    weights, cache = sum(parts.values()) + sum(layers), sum(caches)
    phases = _phases(shapes, present, setting, context, caches)
    activation = max(phases.values()) - cache
    first = parts["vision_tower"] + parts["projector"] + parts["embeddings"]
    placed = [first, *(a + b for a, b in zip(layers, caches, strict=True)), parts["head"]]
    return {
        "params": sum(shapes.parts.values()) + sum(layer.params for layer, _ in present),
        "weight_bytes": weights,
        "kv_cache_bytes": cache,
        "activation_bytes": activation,
        "total_bytes": weights + cache + activation,
        "parts": {**parts, "decoder_layers": sum(layers)},
        "phases": phases,
        "workspace_bytes": _workspace(present, setting),
        "device_bytes": largest_share(placed, setting.devices) + activation,
        "context": context,
        "simulated": any(setting.layout and bits not in setting.layout.bits for _, bits in present if bits != 16),
    }


def layer_bytes(layer: Layer, bits: int, setting: Setting) -> int:
    """Return the weight bytes of a decoder layer at `bits` (16: not rounded; 0: removed), not at `setting.bits`."""
    if not bits:
        return 0
    return layer.others * setting.dtype_bytes + sum(
        setting.layout.linear_bytes(bits, setting.group_size, outputs, inputs)
        if setting.layout and bits != 16
        else outputs * inputs * setting.dtype_bytes
        for outputs, inputs in layer.linears
    )


def cache_bytes(shapes: Architecture, layer: Layer, setting: Setting, context: int) -> int:
    """Return the bytes of a decoder layer's keys and values at the end of the answers."""
    tokens = cached_tokens(context, setting.decode_tokens, layer.window)
    return setting.batch * tokens * cached_bytes(shapes.config.text_config, 1, setting.dtype_bytes)


def _check_setting(shapes: Architecture, setting: Setting) -> int:
    """Return the prompt's tokens; ValueError: the setting does not fit the model."""
    if len(setting.bits) != len(shapes.layers):
        raise ValueError(f"The setting has bits for {len(setting.bits)} layers; the model has {len(shapes.layers)}.")
    if not any(setting.bits):
        raise ValueError(f"All {len(shapes.layers)} layers are removed: at least one must stay.")
    allowed = {0, 16, *setting.rounded_bits}
    for bits in setting.bits:
        if bits not in allowed:
            choices = ", ".join(map(str, sorted(allowed)))
            raise ValueError(
                f"Quantizer {setting.method!r} does not round to {bits} bits: give every layer one of {choices} "
                "(0: removed, 16: not rounded)."
            )
    images = setting.images * shapes.image_tokens
    context = images + TEXT_TOKENS if setting.context is None else setting.context
    if context <= images:
        raise ValueError(
            f"A prompt of {context} tokens cannot hold {setting.images} image(s) of {shapes.image_tokens} tokens and "
            "a question: give a longer estimate.context, or fewer estimate.images."
        )
    return context


def _phases(shapes: Architecture, present, setting: Setting, context: int, caches: Sequence[int]) -> dict[str, int]:
    """Return each phase's bytes beyond the weights, the caller's pixels included."""
    text, vision, size = shapes.config.text_config, shapes.config.vision_config, setting.dtype_bytes
    rows, images = setting.batch, setting.batch * setting.images
    pixels = images * vision.num_channels * vision.image_size**2 * size
    tower = (images, shapes.tower_tokens, vision.hidden_size, vision.intermediate_size)
    states = images * 2 * shapes.tower_tokens * vision.hidden_size * size  # held, as the features, to the end
    features = images * shapes.image_tokens * text.hidden_size * size
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    copies = mlp_copies(text.hidden_act, gated=sum(o == text.intermediate_size for o, _ in present[0][0].linears) > 1)
    masked = rows > 1 or any(layer.window is not None and layer.window < context for layer, _ in present)
    prompt = len(present) * rows * context * cached_bytes(text, 1, size)  # sliding windows are cut after it
    prefill = prefill_bytes(rows, context, text.hidden_size, text.intermediate_size, copies, head, masked, size)
    workspace = _workspace(present, setting)
    wide = rows * context * text.intermediate_size * size  # one such tensor fewer is alive during dequantization
    growth = max(caches) // 2  # a layer's keys are copied when they grow
    logits = logit_bytes(rows, text.vocab_size, size)
    return {
        "vision": pixels + tower_bytes(*tower, mlp_copies(vision.hidden_act, gated=False), size),
        "prefill": pixels + states + 2 * features + prompt + prefill + max(0, workspace - wide),
        "decode": pixels + states + features + sum(caches) + max(growth, workspace) + logits,
    }


def _workspace(present, setting: Setting) -> int:
    """Return the bytes that dequantizing the largest weight takes."""
    rounded = {shape for layer, bits in present if bits != 16 for shape in layer.linears}
    if not rounded or setting.layout is None:
        return 0
    return max(setting.layout.unpacked_bytes(outputs * inputs, setting.dtype_bytes) for outputs, inputs in rounded)
