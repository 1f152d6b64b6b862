"""Rows of one batch, each with its own set of decoder layers: masks, key/value cache, and the switch around a layer.

Axes: R rows, N inputs, Q new tokens, S cached tokens, D width, H heads, L layers.
"""

from collections.abc import Sequence
from contextlib import contextmanager

import torch
from torch import nn

from actors.loading import language_model, layer_devices
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

    def gathered(self, places: Sequence[torch.Tensor], capacity: int) -> "RowCache":
        """Return a new cache with room for `capacity` slots; its layer i holds this one's rows places[i]."""
        new = RowCache(capacity)
        for layer, rows in enumerate(places):
            if layer in self._layers and len(rows):
                new.used = 0
                new.update(*(part[rows, :, : self.used] for part in self._layers[layer]), layer)
        new.used = self.used
        return new


class RowPass:
    """The state of one batch: which rows run which layer, where their tokens stand, what they may attend to.

    Row r belongs to input source_R[r] and joins the batch at layer join_R[r]: below it, it equals the row of
    its input's own number, which runs there in its place. Rows are sorted by the layer at which they join; the
    first N rows are the inputs' own. By default every row is an input of its own, there from the start.

    device: of the inputs and of what is said about them; devices: of the layers, one each.
    """

    def __init__(
        self,
        keep_RL: torch.Tensor,
        windows: Sequence[int | None],
        cache: RowCache,
        device: torch.device,
        devices: Sequence[torch.device],
        source_R: Sequence[int] | None = None,
        join_R: Sequence[int] | None = None,
    ):
        self.keep_RL = keep_RL.cpu()
        self.windows, self.cache, self.device, self.devices = windows, cache, device, devices
        rows = len(keep_RL)
        self.source_R = list(source_R) if source_R is not None else list(range(rows))
        self.join_R = torch.tensor(join_R) if join_R is not None else torch.zeros(rows, dtype=torch.long)
        self._identity = source_R is None
        inputs = len(set(self.source_R))
        self.key_positions_NS = torch.zeros(inputs, 0, dtype=torch.long, device=device)
        self.key_valid_NS = torch.zeros(inputs, 0, dtype=torch.bool, device=device)
        self.layer_rows_run = 0
        self._plan_rows()

    @classmethod
    def over(
        cls,
        model: Llava,
        keep_RL: torch.Tensor,
        slots: int,
        device: torch.device,
        source_R: Sequence[int] | None = None,
        join_R: Sequence[int] | None = None,
    ) -> "RowPass":
        """Return a pass over a model's layers, wherever they are, with room for `slots` tokens a row."""
        windows = attention_windows(model.config.text_config)
        return cls(keep_RL, windows, RowCache(slots), device, layer_devices(model), source_R, join_R)

    def _plan_rows(self) -> None:
        sources = torch.tensor(self.source_R)
        self.rows: list[torch.Tensor] = []  # of each layer: the rows that run it
        self.inputs: list[torch.Tensor] = []  # the inputs that they belong to
        self.joining: list[torch.Tensor] = []  # and the inputs whose hidden states rows that join here begin with
        self.everyone: list[bool] = []
        before = len(self.key_valid_NS)
        for layer, device in enumerate(self.devices):
            count = int((self.join_R <= layer).sum())
            rows = self.keep_RL[:count, layer].nonzero()[:, 0]
            self.everyone.append(len(rows) == count)
            self.rows.append(rows.to(device))
            self.inputs.append(sources[rows].to(device))
            self.joining.append(sources[before:count].to(device))
            before = count

    def begin(self, positions_NQ: torch.Tensor, valid_NQ: torch.Tensor) -> None:
        """Announce the tokens of the next forward; makes the masks [N, 1, Q, S] of every kind of layer."""
        self.key_positions_NS = torch.cat([self.key_positions_NS, positions_NQ], dim=1)
        self.key_valid_NS = torch.cat([self.key_valid_NS, valid_NQ], dim=1)
        age_NQS = positions_NQ[:, :, None] - self.key_positions_NS[:, None, :]
        causal_NQS = self.key_valid_NS[:, None, :] & (age_NQS >= 0)
        count = positions_NQ.shape[1]
        # A padding token sees itself, so that its softmax is defined; nothing ever reads it.
        own = torch.eye(count, dtype=torch.bool, device=positions_NQ.device) & ~valid_NQ[:, :, None]
        self._masks = {}
        for window in set(self.windows):
            mask = causal_NQS.clone() if window is None else causal_NQS & (age_NQS < window)
            mask[:, :, -count:] |= own
            self._masks[window, self.device] = mask[:, None]

    def end(self, count: int) -> None:
        """Close a forward of `count` tokens."""
        self.cache.used += count

    def mask(self, layer: int) -> torch.Tensor:
        """Return one layer's attention mask for all inputs, on the layer's device."""
        window, device = self.windows[layer], self.devices[layer]
        if (window, device) not in self._masks:
            self._masks[window, device] = self._masks[window, self.device].to(device)
        return self._masks[window, device]

    def drop(self, active_R: torch.Tensor) -> None:
        """Take the rows that are not active out of the batch (only where every row is an input of its own)."""
        assert self._identity
        for layer, rows in enumerate(self.rows):
            self.cache.select(layer, active_R.to(rows.device)[rows])
        self.keep_RL = self.keep_RL[active_R.cpu()]
        self.join_R = self.join_R[active_R.cpu()]
        self.source_R = list(range(len(self.keep_RL)))
        self.key_positions_NS = self.key_positions_NS[active_R]
        self.key_valid_NS = self.key_valid_NS[active_R]
        self._plan_rows()

    def places(self, chosen: Sequence[int]) -> list[torch.Tensor]:
        """Return, per layer, where its cache holds the prompts of the `chosen` rows that keep it."""
        found = []
        for layer, rows in enumerate(self.rows):
            place = {row: i for i, row in enumerate(rows.tolist())}
            owners = [r if self.join_R[r] <= layer else self.source_R[r] for r in chosen if self.keep_RL[r, layer]]
            found.append(torch.tensor([place[owner] for owner in owners], dtype=torch.long, device=rows.device))
        return found


class RowSwitch(nn.Module):
    """A stock decoder layer that runs for the rows that keep it; the others pass through."""

    def __init__(self, layer: nn.Module, index: int, state: RowPass):
        super().__init__()
        self.layer, self.index, self.state = layer, index, state

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """Run the layer on the rows [R, Q, D] that keep it, with their part of every argument; let rows join."""
        state, index = self.state, self.index
        rows, inputs, joining = state.rows[index], state.inputs[index], state.joining[index]
        hidden_states = hidden_states.to(rows.device)
        kwargs["position_ids"] = kwargs["position_ids"].to(rows.device)
        kwargs["position_embeddings"] = tuple(part.to(rows.device) for part in kwargs["position_embeddings"])
        if len(joining):
            hidden_states = torch.cat([hidden_states, hidden_states[joining]])
        state.layer_rows_run += len(rows)
        if len(rows) == 0:
            return hidden_states
        mask = state.mask(index)
        if not (state.everyone[index] and len(inputs) == len(mask)):
            mask = mask[inputs]
            kwargs["position_ids"] = kwargs["position_ids"][inputs]
            kwargs["position_embeddings"] = tuple(part[inputs] for part in kwargs["position_embeddings"])
        kwargs["attention_mask"] = mask
        if state.everyone[index]:
            return _first(self.layer(hidden_states, *args, **kwargs))
        return hidden_states.index_copy(0, rows, _first(self.layer(hidden_states[rows], *args, **kwargs)))


def _first(output):
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def switched(model: Llava, state: RowPass):
    """Put RowSwitch around every decoder layer for the length of the block; yields the decoder."""
    decoder = language_model(model)
    stock = decoder.layers
    decoder.layers = nn.ModuleList(RowSwitch(layer, i, state) for i, layer in enumerate(stock))
    try:
        yield decoder
    finally:
        decoder.layers = stock


def run_tokens(model: Llava, state: RowPass, embeds_NQD, positions_NQ, valid_NQ) -> torch.Tensor:
    """Run one forward of the decoder over new tokens of every input; return the last hidden states [R, Q, D]."""
    state.begin(positions_NQ, valid_NQ)
    with switched(model, state) as decoder:
        hidden = decoder(
            inputs_embeds=embeds_NQD,
            attention_mask=state.mask(0),
            position_ids=positions_NQ,
            past_key_values=state.cache,
            use_cache=True,
        ).last_hidden_state
    state.end(embeds_NQD.shape[1])
    return hidden
