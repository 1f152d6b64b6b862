"""Rows that read no draft are decoded together, token by token, each with its own set of decoder layers.

Axes: R rows, S cached tokens, D width, L layers.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from actors.engine.pace import Pace
from actors.engine.rows import Part
from actors.engine.switch import RowCache, decode_rows, hidden_of, on_device, switched
from actors.specs import Llava


@dataclass(frozen=True)
class Limits:
    """When an answer ends: after `tokens` new tokens, or with one of the `stops`."""

    tokens: int
    stops: tuple[int, ...]

    def ended(self, answer: Sequence[int]) -> bool:
        """Tell whether an answer is complete."""
        return len(answer) >= self.tokens or (bool(answer) and answer[-1] in self.stops)

    def cut(self, draft: Sequence[int]) -> list[int]:
        """Return a draft without what can follow neither a stop token nor the longest answer."""
        for place, token in enumerate(draft):
            if token in self.stops:
                return list(draft[: min(place + 1, self.tokens)])
        return list(draft[: self.tokens])


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


def decode(model: Llava, parts: Sequence[Part], answers: Sequence[list[int]], limits: Limits, pace: Pace) -> None:
    """Extend the answers of all parts' rows in place until they end; the last token of each is the next to feed."""
    room = limits.tokens - min(len(answer) for answer in answers)
    state = StepPass(parts, room, model.lm_head.weight.dtype)
    live = list(answers)
    with switched(model, state) as decoder:
        device = decoder.embed_tokens.weight.device
        positions_R = torch.tensor([len(slots) for part in parts for slots in part.slots], device=device)
        while True:
            open_rows = [not limits.ended(answer) for answer in live]
            if not any(open_rows):
                return
            if not all(open_rows):
                order = state.drop(torch.tensor(open_rows))
                positions_R = positions_R[order.to(device)]
                live = [live[row] for row in order.tolist()]
            began = time.perf_counter()
            tokens = torch.tensor([answer[-1] for answer in live], device=device)
            hidden = state.forward(decoder, tokens, positions_R)
            for answer, token in zip(live, model.lm_head(hidden).argmax(-1).tolist(), strict=True):
                answer.append(token)
            pace.note_pass(len(live), time.perf_counter() - began)
            positions_R = positions_R + 1
