"""The language model as GGUF: its keys, and its tensors under llama.cpp's names.

Source: conversion/llama.py, qwen.py, phi.py and base.py of github.com/ggml-org/llama.cpp, and src/models of it.
llama.cpp rotates neighbouring channels in the Llama architecture, where transformers rotates channels half a head
apart: the rows of q and k change their order. Its Llama reads biases wherever there are some, so that Mistral and Llama
are one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from actors.export.ggml import TYPES, Kind, check_widths, encode
from actors.export.gguf_file import Entry, Stored
from actors.maths.blocks import q4_1_blocks
from actors.maths.rounding import dequantize, unpack
from actors.narrowing.groups import Heads

PACKED = (".qweight", ".qzeros", ".scales")


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp calls a decoder of transformers, and how its files differ."""

    name: gguf.MODEL_ARCH
    activations: tuple[str, ...]
    interleaved: bool = False  # the rows of q and k in the order of neighbouring channels
    rms: bool = True
    head_bias: bool = False


ARCHITECTURES = {
    "llama": Architecture(gguf.MODEL_ARCH.LLAMA, ("silu",), interleaved=True),
    "mistral": Architecture(gguf.MODEL_ARCH.LLAMA, ("silu",), interleaved=True),
    "qwen2": Architecture(gguf.MODEL_ARCH.QWEN2, ("silu",)),
    "phi": Architecture(gguf.MODEL_ARCH.PHI2, ("gelu_new", "gelu_pytorch_tanh"), rms=False, head_bias=True),
}  # by text_config.model_type


def check_text(config, type_name: str) -> None:
    """Raise ValueError if llama.cpp would compute something else with this decoder, or the type cannot hold it."""
    text = config.text_config
    known = ARCHITECTURES.get(text.model_type)
    if known is None:
        raise ValueError(f"A language model of type {text.model_type!r} has no GGUF: {', '.join(ARCHITECTURES)} have.")
    if text.hidden_act not in known.activations:
        raise ValueError(f"llama.cpp's {text.model_type} computes {known.activations[0]}, not {text.hidden_act!r}.")
    if (rope := text.rope_parameters["rope_type"]) != "default":
        raise ValueError(f"Only the default rotary positions are exported, not {rope!r} (text_config.rope_parameters).")
    if getattr(text, "qk_layernorm", False):
        raise ValueError("llama.cpp's phi2 has no norms of queries and keys (text_config.qk_layernorm).")
    heads_width = text.num_attention_heads * Heads.of(text).size
    check_widths(type_name, [text.hidden_size, heads_width, text.intermediate_size])


def context_length(text) -> int:
    """Return the longest context (tokens) in which llama.cpp, which knows no windows here, computes the same."""
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    return min(text.max_position_embeddings, window or text.max_position_embeddings)


def write_keys(writer: gguf.GGUFWriter, config, type_name: str) -> None:
    """Write the keys of the architecture."""
    text = config.text_config
    known, head_size = ARCHITECTURES[text.model_type], Heads.of(text).size
    rotary_size = int(head_size * text.rope_parameters.get("partial_rotary_factor", 1.0))
    writer.add_context_length(context_length(text))
    writer.add_embedding_length(text.hidden_size)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(rotary_size)
    writer.add_rope_freq_base(text.rope_parameters["rope_theta"])
    writer.add_vocab_size(text.vocab_size)
    if known.rms:
        writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    else:
        writer.add_layer_norm_eps(text.layer_norm_eps)
    writer.add_file_type(TYPES[type_name].file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def entries(folder: Path, config, type_name: str) -> Iterator[Entry]:
    """Yield the decoder's tensors, embeddings and head included, in the order of the file.

    ValueError: a tensor that llama.cpp has no name for.
    """
    text, stored = config.text_config, Stored(folder)
    known, kinds = ARCHITECTURES[text.model_type], TYPES[type_name]
    names = gguf.get_tensor_name_map(known.name, text.num_hidden_layers)
    for name in stored.names("language_model."):
        plain = name.removeprefix("language_model.")
        if plain.endswith(PACKED[1:]) or (plain == "lm_head.weight" and config.tie_word_embeddings):
            continue
        plain = plain.replace(".qweight", ".weight")
        if (target := names.get_name(plain, try_suffixes=(".weight", ".bias"))) is None:
            raise ValueError(f"llama.cpp's {gguf.MODEL_ARCH_NAMES[known.name]} has no tensor like {name!r}.")
        heads = _permuted_heads(plain, text) if known.interleaved else 0
        if name.endswith(PACKED[0]):
            yield _packed(stored, name.removesuffix(PACKED[0]), target, kinds.linears, heads)
            continue
        shape = stored.shape(name)
        kind = Kind.F32 if len(shape) == 1 else kinds.linears if ".blk." in f".{target}" else kinds.rest
        yield Entry(target, shape, kind, partial(_plain, stored, name, kind, heads))
    if known.head_bias:  # a LLaVA's head has none
        yield Entry("output.bias", (text.vocab_size,), Kind.F32, lambda: np.zeros(text.vocab_size, np.float32))


def _permuted_heads(name: str, text) -> int:
    """Return how many heads a tensor's rows hold if their order changes, else 0."""
    stem = name.rpartition(".")[0]
    return {"q_proj": text.num_attention_heads, "k_proj": text.num_key_value_heads}.get(stem.rpartition(".")[2], 0)


def interleave(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Return rows [heads * size, ...] with channel i beside channel i + size / 2 of its head."""
    return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape) if heads else tensor


def _plain(stored: Stored, name: str, kind: Kind, heads: int) -> Any:
    return encode(interleave(stored.read(name), heads).float().numpy(), kind, name)


def _packed(stored: Stored, stem: str, target: str, kind: Kind, heads: int) -> Entry:
    inputs, words = stored.shape(stem + PACKED[0])
    shape = (words * 8, inputs)

    def data() -> Any:
        q, zero = (interleave(unpack(stored.read(stem + part)).T.contiguous(), heads) for part in PACKED[:2])
        scale = interleave(stored.read(stem + PACKED[2]).T.contiguous(), heads)
        if kind == Kind.Q4_1:
            return q4_1_blocks(q.numpy(), zero.numpy(), scale.float().numpy())
        return encode(dequantize(q, zero, scale).numpy(), kind, stem)

    return Entry(target, shape, kind, data)
