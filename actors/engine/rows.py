"""Rows of one batch, each with its own set of decoder layers: their masks, and what of the cache is whose.

A PromptPass runs many tokens at once, padded behind each input, where nothing sees the padding; a mask is only needed
for windows, and where several inputs share a row. What goes on from there is in actors.engine.pieces and .steps.

Axes: R rows, G rows of inputs, Q new tokens, S cached tokens, D width, H heads, L layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from actors.checkpoint.loading import layer_devices
from actors.engine.packing import Layout
from actors.engine.switch import RowCache, decode_rows, hidden_of, layer_windows, on_device, switched
from actors.specs import Llava


@dataclass(frozen=True)
class RowTable:
    """The layers that each of R rows keeps, and the layer from which on it is computed for itself.

    Below join_R[r], row r equals row source_R[r], which is computed there in its place.
    """

    keep_RL: torch.Tensor
    source_R: torch.Tensor
    join_R: torch.Tensor

    def owners(self, layer: int, chosen_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return which of the `chosen` rows keep a layer, and where its cache holds them (or what they equal there).

        A layer's cache has the rows that keep it and are computed there for themselves, in order.
        """
        rows = self.cached(layer)
        place_R = torch.full((len(self.keep_RL),), -1)
        place_R[rows] = torch.arange(len(rows))
        keeping = self.keep_RL[chosen_C, layer].nonzero()[:, 0]
        rows_K = chosen_C[keeping]
        return keeping, place_R[torch.where(self.join_R[rows_K] <= layer, rows_K, self.source_R[rows_K])]

    def cached(self, layer: int) -> torch.Tensor:
        """Return the rows of a layer's cache."""
        return ((self.join_R <= layer) & self.keep_RL[:, layer]).nonzero()[:, 0]


class PromptPass:
    """One forward over the prompts (and drafts) in G rows of inputs, of which R variants are made.

    Row r is a variant of row source_R[r] and joins the batch at layer join_R[r]: below it, it equals that row,
    which runs there in its place. Rows are sorted by the layer at which they join; the first G rows are the
    sources (actors.engine.verification.RowPlan has an example). By default every row is its own source, there from the
    start.
    """

    def __init__(
        self, model: Llava, keep_RL: torch.Tensor, source_R: Sequence[int] | None = None, join_R: Sequence[int] = ()
    ):
        self.windows, self.devices = layer_windows(model), layer_devices(model)
        rows = len(keep_RL)
        source = torch.tensor(source_R if source_R is not None else range(rows))
        join = torch.tensor(join_R) if join_R else torch.zeros(rows, dtype=torch.long)
        self.table = self.running = RowTable(keep_RL.cpu(), source, join)
        self.layer_rows_run = 0
        self.cache = RowCache(0)
        self._masks: dict[int | None, torch.Tensor | None] = {}

    def forward(self, model: Llava, embeds_GQD: torch.Tensor, layout: Layout | None = None) -> torch.Tensor:
        """Return the last hidden states [R, Q, D]; layout: by default, a row is one input, padded on the right."""
        count, device = embeds_GQD.shape[1], embeds_GQD.device
        self.cache, layout = RowCache(count), layout or Layout.plain(count)
        for window in set(self.windows):
            mask = layout.mask(window)
            self._masks[window] = None if mask is None else mask.to(device)
        with switched(model, self) as decoder:
            positions = layout.positions_Q[None].to(device)
            return decode_rows(decoder, embeds_GQD, positions, self.cache, len(self.table.keep_RL))

    def run(self, index: int, layer: nn.Module, hidden: torch.Tensor, args: tuple, kwargs: dict) -> torch.Tensor:
        """Let rows join; run one layer on the rows that keep it, the others pass through."""
        device = self.devices[index]
        hidden = hidden.to(device)
        rows = self.running
        count = int((rows.join_R <= index).sum())
        before = len(rows.source_R.unique()) if index == 0 else len(hidden)
        if count == before:
            return self._run(index, layer, hidden, args, kwargs)
        joining = hidden[rows.source_R[before:count].to(device)]
        if rows.keep_RL[before:count, index].any():
            return self._run(index, layer, torch.cat([hidden, joining]), args, kwargs)
        return torch.cat([self._run(index, layer, hidden, args, kwargs), joining])  # it is the one that they lack

    def _run(self, index: int, layer: nn.Module, hidden: torch.Tensor, args: tuple, kwargs: dict) -> torch.Tensor:
        rows = self.running.keep_RL[: len(hidden), index].nonzero()[:, 0]
        self.layer_rows_run += len(rows)
        if not len(rows):
            return hidden
        kwargs = self._given(index, rows, kwargs, hidden.device)
        if len(rows) == len(hidden):
            return hidden_of(layer(hidden, *args, **kwargs))
        rows = rows.to(hidden.device)
        return hidden.index_copy(0, rows, hidden_of(layer(hidden[rows], *args, **kwargs)))

    def _given(self, index: int, rows: torch.Tensor, kwargs: dict, device: torch.device) -> dict:
        """Return a layer's arguments for `rows` of those that run."""
        return on_device(kwargs, device, self._masks[self.windows[index]])


@dataclass(frozen=True)
class Part:
    """What goes on from a prompt pass: some inputs' rows, and the slots that hold their tokens, in order."""

    prompt: PromptPass
    rows: Sequence[int]
    slots: Sequence[Sequence[int]]

    def take(self, layer: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return which of the rows keep a layer, and their keys and values [K, H, S, head] there, padded behind."""
        keys, values = self.prompt.cache.layers[layer]
        keeping, places = self.prompt.table.owners(layer, torch.tensor(self.rows))
        if not len(keeping):
            return keeping, []
        slots_KS = pad_sequence([torch.tensor(self.slots[row]) for row in keeping.tolist()], True).to(keys.device)
        places = places.to(keys.device)
        return keeping, [both.transpose(1, 2)[places[:, None], slots_KS].transpose(1, 2) for both in (keys, values)]
