"""A switch around every decoder layer, which lets a pass decide which rows run it; and the cache of such a pass.

Axes: R rows, Q new tokens, D width, H heads, L layers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import nn

from actors.checkpoint.loading import language_model
from actors.engine.threads import threads_for
from actors.specs import Llava


def attention_windows(text_config) -> list[int | None]:
    """Return each layer's sliding window in tokens, None where it attends to everything."""
    window = getattr(text_config, "sliding_window", None)
    kinds = getattr(text_config, "layer_types", None) or ["sliding_attention"] * text_config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


class RowCache:
    """Keys and values of a pass: per layer, the rows that run it, in buffers of `capacity` slots.

    `used` is the number of slots filled before the current forward; it advances once per forward.
    """

    def __init__(self, capacity: int, used: int = 0):
        self.capacity, self.used = capacity, used
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: object, **__: object):
        """Store new keys and values [rows, H, Q, head] of one layer; return all of them so far."""
        end = self.used + keys.shape[2]
        if layer not in self.layers:
            if keys.shape[2] == self.capacity:  # nothing will follow: no buffer to copy them to
                self.layers[layer] = keys, values
                return keys, values
            self.layers[layer] = self._buffer(keys), self._buffer(values)
        all_keys, all_values = self.layers[layer]
        all_keys[:, :, self.used : end] = keys
        all_values[:, :, self.used : end] = values
        return all_keys[:, :, :end], all_values[:, :, :end]

    def place(self, layer: int, rows: int, at: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put slots filled elsewhere into rows `at` of one layer, which has `rows`; zeros where none are put."""
        if layer not in self.layers:
            self.layers[layer] = tuple(
                p.new_zeros(rows, p.shape[1], self.capacity, p.shape[-1]) for p in (keys, values)
            )
        for buffer, part in zip(self.layers[layer], (keys, values), strict=True):
            filled = min(self.used, part.shape[2])
            buffer[at, :, :filled] = part[:, :, :filled]

    def keep_first(self, rows: int, holes: torch.Tensor, movers: torch.Tensor) -> None:
        """Keep only the first `rows` of every layer, after the rows `movers` have taken the places `holes`."""
        for layer, both in self.layers.items():
            for buffer in both:
                buffer[holes.to(buffer.device)] = buffer[movers.to(buffer.device)]
            self.layers[layer] = tuple(buffer[:rows] for buffer in both)

    def get_seq_length(self, *_: object) -> int:
        """Return the number of filled slots (stock models ask for it)."""
        return self.used

    def _buffer(self, part: torch.Tensor) -> torch.Tensor:
        return part.new_empty(part.shape[0], part.shape[1], self.capacity, part.shape[-1])


class Pass(Protocol):
    """What a RowSwitch asks of a pass."""

    def run(self, index: int, layer: nn.Module, hidden: torch.Tensor, args: tuple, kwargs: dict) -> torch.Tensor:
        """Run one layer on the rows [R, Q, D] that keep it."""
        ...


class RowSwitch(nn.Module):
    """A stock decoder layer that runs for the rows that keep it; the others pass through."""

    def __init__(self, layer: nn.Module, index: int, state: Pass):
        super().__init__()
        self.layer, self.index, self.state = layer, index, state

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """Let the pass decide which rows run."""
        return self.state.run(self.index, self.layer, hidden_states, args, kwargs)


@contextmanager
def switched(model: Llava, state: Pass) -> Iterator[nn.Module]:
    """Put RowSwitch around every decoder layer for the length of the block; yields the decoder."""
    decoder = language_model(model)
    stock = decoder.layers
    decoder.layers = nn.ModuleList(RowSwitch(layer, i, state) for i, layer in enumerate(stock))
    try:
        yield decoder
    finally:
        decoder.layers = stock


def decode_rows(decoder: nn.Module, embeds_RQD, positions_RQ, cache: RowCache, rows: int) -> torch.Tensor:
    """Run the decoder; rows: how many there are at the end."""
    # A mask of four axes is taken as it is, so that the decoder makes none; every layer gets its pass's instead.
    no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=embeds_RQD.device)
    config = decoder.config
    with threads_for(rows * embeds_RQD.shape[1], config.hidden_size, config.intermediate_size):
        return decoder(
            inputs_embeds=embeds_RQD,
            attention_mask=no_mask,
            position_ids=positions_RQ,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state


def layer_windows(model: Llava) -> list[int | None]:
    """Return each layer's sliding window; AssertionError: the model's attention is not sdpa."""
    text = model.config.text_config
    # Without a mask, eager attention would look ahead; sdpa knows causality by itself.
    assert text._attn_implementation == "sdpa", text._attn_implementation
    return attention_windows(text)


def on_device(kwargs: dict, device: torch.device, mask: torch.Tensor | None) -> dict:
    """Return a layer's arguments on its device, with its own mask."""
    return kwargs | {
        "attention_mask": None if mask is None else mask.to(device),
        "position_ids": kwargs["position_ids"].to(device),
        "position_embeddings": tuple(part.to(device) for part in kwargs["position_embeddings"]),
    }


def hidden_of(output) -> torch.Tensor:
    """Return the hidden states of what a layer gives."""
    return output[0] if isinstance(output, tuple) else output
