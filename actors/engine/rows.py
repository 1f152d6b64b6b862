"""Rows of one batch, each with its own set of decoder layers: their masks, and what of the cache is whose.

Two kinds of pass. A PromptPass runs many tokens at once, padded behind each input, where nothing sees the padding; a
mask is only needed for windows, and where several inputs share a row. A StepPass goes on from there, token by token.

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


class StepPass:
    """Goes on with some rows of prompt passes, token by token; takes their part of the caches, layer by layer.

    Rows have read different numbers of tokens, but a new token goes into the same slot of all of them. A mask hides the
    empty slots of a row, and every row counts its own positions. Example: rows that read five and three tokens, and two
    new tokens x, y each:

        slot       0 1 2 3 4 5 6
        row 0      a b c d e x y    positions 0 1 2 3 4 5 6
        row 1      f g h - - x y    positions 0 1 2 - - 3 4

    Every row runs every layer that any of them keeps, and those that don't keep it take their old hidden state
    afterwards: for single tokens that is sooner than to gather and scatter rows.
    """

    def __init__(self, parts: Sequence[Part], room: int, dtype: torch.dtype):
        """room: most tokens to come; dtype: of the hidden states."""
        first = parts[0].prompt
        self.windows, self.devices, self.dtype = first.windows, first.devices, dtype
        kept_R = torch.tensor([len(slots) for part in parts for slots in part.slots])
        self.cache = RowCache(int(kept_R.max()) + room, int(kept_R.max()))
        start = 0
        for part in parts:
            for layer in sorted(part.prompt.cache.layers):
                keeping, taken = part.take(layer)
                part.prompt.cache.layers.pop(layer)
                if taken:
                    self.cache.place(layer, len(kept_R), (start + keeping).to(taken[0].device), *taken)
            start += len(part.rows)
        self.keep_RL = torch.cat([part.prompt.table.keep_RL[list(part.rows)] for part in parts])
        slots_S = torch.arange(self.cache.capacity)
        self.valid_RS = slots_S < kept_R[:, None]
        self.key_positions_RS = slots_S.repeat(len(kept_R), 1)
        self._masks: dict[tuple, torch.Tensor] = {}
        self._plan()

    def _plan(self) -> None:
        self._some = [None if keep.all() or not keep.any() else keep for keep in self.keep_RL.T]
        self._some = [k if k is None else k[:, None, None].to(d) for k, d in zip(self._some, self.devices, strict=True)]
        self._any = self.keep_RL.any(0).tolist()

    def forward(self, decoder: nn.Module, tokens_R: torch.Tensor, positions_R: torch.Tensor) -> torch.Tensor:
        """Return the last hidden states [R, D] of one more token of every row; inside `switched`."""
        slot, device = self.cache.used, tokens_R.device
        if self.valid_RS.device != device:
            self.valid_RS, self.key_positions_RS = self.valid_RS.to(device), self.key_positions_RS.to(device)
        self.valid_RS[:, slot] = True
        self.key_positions_RS[:, slot] = positions_R
        self._masks = {}
        for window in set(self.windows):
            seen_RS = self.valid_RS[:, : slot + 1]
            if window is not None:
                seen_RS = seen_RS & (positions_R[:, None] - self.key_positions_RS[:, : slot + 1] < window)
            mask = torch.zeros(seen_RS.shape, dtype=self.dtype, device=device).masked_fill_(~seen_RS, -torch.inf)
            self._masks[window, device] = mask[:, None, None]
        hidden = decode_rows(
            decoder, decoder.embed_tokens(tokens_R)[:, None], positions_R[:, None], self.cache, len(tokens_R)
        )
        self.cache.used += 1
        return hidden[:, -1]

    def run(self, index: int, layer: nn.Module, hidden: torch.Tensor, args: tuple, kwargs: dict) -> torch.Tensor:
        """Run one layer on all rows; those that don't keep it go on as they were."""
        device, window = self.devices[index], self.windows[index]
        hidden = hidden.to(device)
        if not self._any[index]:
            return hidden
        if (window, device) not in self._masks:
            made_on = next(where for kind, where in self._masks if kind == window)
            self._masks[window, device] = self._masks[window, made_on].to(device)
        after = hidden_of(layer(hidden, *args, **on_device(kwargs, device, self._masks[window, device])))
        keep = self._some[index]
        return after if keep is None else torch.where(keep, after, hidden)

    def drop(self, active_R: torch.Tensor) -> torch.Tensor:
        """Take the rows that are not active out of the batch; return which row stands at every place now.

        The last rows move to the places that become free, so that only as many are copied as are dropped.
        """
        active_R, count = active_R.cpu(), int(active_R.sum())
        order = torch.arange(count)
        holes, movers = (~active_R[:count]).nonzero()[:, 0], count + active_R[count:].nonzero()[:, 0]
        order[holes] = movers
        self.cache.keep_first(count, holes, movers)
        self.keep_RL = self.keep_RL[order]
        there = order.to(self.valid_RS.device)
        self.valid_RS, self.key_positions_RS = self.valid_RS[there], self.key_positions_RS[there]
        self._plan()
        return order
