"""Greedy answers of one loaded model with any set of decoder layers switched off, row by row.

Removing a layer is a switch, not surgery: a pre-norm decoder layer adds to the residual stream, so a row
without layer b just passes the stream on. Every row of a batch carries its own set of removed layers; layer b
runs for the rows that keep it, and its part of the key/value cache holds those rows alone. One model then
answers for all removals in one batch, token for token what physically pruned models would say.

Axes: R rows, Q new tokens, S cached tokens, D width, H heads, L layers.
"""

from collections.abc import Sequence
from contextlib import contextmanager

import torch
from torch import nn

from actors.loading import language_model
from actors.specs import Llava


def attention_windows(text_config) -> list[int | None]:
    """Return each layer's sliding window in tokens, None where it attends to everything."""
    window = getattr(text_config, "sliding_window", None)
    kinds = getattr(text_config, "layer_types", None) or ["sliding_attention"] * text_config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


class RowCache:
    """Keys and values of a pass: per layer, the rows that keep it, in buffers allocated once.

    `used` is the number of slots filled before the current forward; it advances once per forward.
    """

    def __init__(self, capacity: int):
        self.capacity, self.used = capacity, 0
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: object, **__: object):
        """Store new keys and values [rows, H, Q, head] of one layer; return all of them so far."""
        if layer not in self._layers:
            rows, heads, _, size = keys.shape
            self._layers[layer] = (
                keys.new_empty(rows, heads, self.capacity, size),
                values.new_empty(rows, heads, self.capacity, values.shape[-1]),
            )
        end = self.used + keys.shape[2]
        all_keys, all_values = self._layers[layer]
        all_keys[:, :, self.used : end] = keys
        all_values[:, :, self.used : end] = values
        return all_keys[:, :, :end], all_values[:, :, :end]

    def get_seq_length(self, *_: object) -> int:
        """Return the number of filled slots (stock models ask for it)."""
        return self.used

    def select(self, layer: int, rows: torch.Tensor) -> None:
        """Keep only `rows` (a mask over the layer's own rows) of one layer."""
        if layer in self._layers:
            keys, values = self._layers[layer]
            self._layers[layer] = (keys[rows], values[rows])


class RowPass:
    """The state of one batch: which rows run which layer, where their tokens stand, what they may attend to."""

    def __init__(self, keep_RL: torch.Tensor, windows: Sequence[int | None], capacity: int):
        self.keep_RL, self.windows = keep_RL, windows
        self.cache = RowCache(capacity)
        rows, device = len(keep_RL), keep_RL.device
        self.key_positions_RS = torch.zeros(rows, 0, dtype=torch.long, device=device)
        self.key_valid_RS = torch.zeros(rows, 0, dtype=torch.bool, device=device)
        self._plan_rows()

    def _plan_rows(self) -> None:
        # None where all rows run the layer: no indexing needed
        columns = self.keep_RL.T
        everyone = columns.all(dim=1).tolist()
        self.rows = [None if everyone[i] else column.nonzero()[:, 0] for i, column in enumerate(columns)]

    def begin(self, positions_RQ: torch.Tensor, valid_RQ: torch.Tensor) -> None:
        """Announce the tokens of the next forward; makes the masks [R, 1, Q, S] of every kind of layer."""
        self.key_positions_RS = torch.cat([self.key_positions_RS, positions_RQ], dim=1)
        self.key_valid_RS = torch.cat([self.key_valid_RS, valid_RQ], dim=1)
        age_RQS = positions_RQ[:, :, None] - self.key_positions_RS[:, None, :]
        causal_RQS = self.key_valid_RS[:, None, :] & (age_RQS >= 0)
        count = positions_RQ.shape[1]
        # A padding token sees itself, so that its softmax is defined; nothing ever reads it.
        own = torch.eye(count, dtype=torch.bool, device=positions_RQ.device) & ~valid_RQ[:, :, None]
        self._masks = {}
        for window in set(self.windows):
            mask = causal_RQS if window is None else causal_RQS & (age_RQS < window)
            mask[:, :, -count:] |= own
            self._masks[window] = mask[:, None]

    def end(self, count: int) -> None:
        """Close a forward of `count` tokens."""
        self.cache.used += count

    def mask(self, layer: int) -> torch.Tensor:
        """Return one layer's attention mask for all rows."""
        return self._masks[self.windows[layer]]

    def drop(self, active_R: torch.Tensor) -> None:
        """Take the rows that are not active out of the batch."""
        for layer, rows in enumerate(self.rows):
            self.cache.select(layer, active_R if rows is None else active_R[rows])
        self.keep_RL = self.keep_RL[active_R]
        self.key_positions_RS = self.key_positions_RS[active_R]
        self.key_valid_RS = self.key_valid_RS[active_R]
        self._plan_rows()


class RowSwitch(nn.Module):
    """A stock decoder layer that runs for the rows that keep it; the others pass through."""

    def __init__(self, layer: nn.Module, index: int, state: RowPass):
        super().__init__()
        self.layer, self.index, self.state = layer, index, state

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """Run the layer on the rows [R, Q, D] that keep it, with their part of every argument."""
        rows = self.state.rows[self.index]
        mask = self.state.mask(self.index)
        if rows is None:
            return _first(self.layer(hidden_states, *args, **{**kwargs, "attention_mask": mask}))
        if len(rows) == 0:
            return hidden_states
        kwargs["position_ids"] = kwargs["position_ids"][rows]
        kwargs["position_embeddings"] = tuple(part[rows] for part in kwargs["position_embeddings"])
        out = _first(self.layer(hidden_states[rows], *args, **{**kwargs, "attention_mask": mask[rows]}))
        return hidden_states.index_copy(0, rows, out)


def _first(output):
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def switched(model: Llava, state: RowPass):
    """Put RowSwitch around every decoder layer for the length of the block."""
    decoder = language_model(model)
    stock = decoder.layers
    decoder.layers = nn.ModuleList(RowSwitch(layer, i, state) for i, layer in enumerate(stock))
    try:
        yield decoder
    finally:
        decoder.layers = stock


@torch.inference_mode()
def greedy(
    model: Llava,
    prompts: Sequence[torch.Tensor],
    keep_RL: torch.Tensor,
    max_new_tokens: int,
    stop_tokens: Sequence[int],
) -> list[list[int]]:
    """Greedy answers, one per row; row r uses the layers that keep_RL[r] marks True.

    prompts: R embedded prompts [tokens, D] (image features in place). Returns the new token ids of every row,
    the stop token included if it came; equal to `generate(do_sample=False)` on physically pruned models.
    """
    device, dtype = prompts[0].device, prompts[0].dtype
    longest = max(map(len, prompts))
    embeds = torch.zeros(len(prompts), longest, prompts[0].shape[-1], device=device, dtype=dtype)
    valid = torch.zeros(len(prompts), longest, dtype=torch.bool, device=device)
    for row, prompt in enumerate(prompts):  # padded on the left: every row's last token is in the last slot
        embeds[row, longest - len(prompt) :] = prompt
        valid[row, longest - len(prompt) :] = True
    state = RowPass(keep_RL.to(device), attention_windows(model.config.text_config), longest + max_new_tokens)
    positions = (valid.long().cumsum(1) - 1).clamp(min=0)
    answers: list[list[int]] = [[] for _ in prompts]
    live = list(range(len(prompts)))
    stops = torch.tensor(list(stop_tokens), device=device)
    with switched(model, state) as decoder:
        for step in range(max_new_tokens):
            state.begin(positions, valid)
            hidden = decoder(
                inputs_embeds=embeds,
                attention_mask=state.mask(0),
                position_ids=positions,
                past_key_values=state.cache,
                use_cache=True,
            ).last_hidden_state
            state.end(embeds.shape[1])
            tokens = model.lm_head(hidden[:, -1]).argmax(-1)
            active = ~torch.isin(tokens, stops)
            for row, token in zip(live, tokens.tolist(), strict=True):
                answers[row].append(token)
            if step == max_new_tokens - 1 or not active.any():
                break
            positions = positions[:, -1:] + 1
            if not active.all():
                state.drop(active)
                live = [row for row, on in zip(live, active.tolist(), strict=True) if on]
                tokens, positions = tokens[active], positions[active]
            embeds = decoder.embed_tokens(tokens)[:, None]
            valid = torch.ones_like(positions, dtype=torch.bool)
    return answers
