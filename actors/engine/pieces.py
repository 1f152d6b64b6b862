"""Rows whose answers follow a draft read it piece by piece, and share with the base what lies below their removals.

As long as a variant says what the draft says, it reads the same tokens as the base, and below the lowest layer in which
the two differ it computes the same. A piece is one pass over the base's rows (the sources) and the variants' rows
(the followers) that are still on the draft. Rows that have left it wait here for the steps that decode them.

Axes: R rows, G sources, F followers, Q new tokens, S cached tokens, D width, L layers.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch

from actors.checkpoint.loading import language_model
from actors.engine.rows import Part, PromptPass, RowTable
from actors.engine.switch import RowCache, decode_rows, on_device, switched
from actors.specs import Llava


class GoingOn(NamedTuple):
    """A row of a prompt pass that goes on, and the slots there of what it has read; join, source: see RowTable."""

    prompt: PromptPass
    row: int
    slots: Sequence[int]
    join: int
    source: int


class PieceCache(RowCache):
    """Keys and values of every row that goes on; a forward fills the slots of the rows that run."""

    def __init__(self, capacity: int, used: int):
        super().__init__(capacity, used)
        self.running: torch.Tensor | None = None  # of the layer at hand: where its cache holds the rows that run

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: object, **__: object):
        """Store new keys and values [rows, H, Q, head] of the rows that run; return all of theirs so far."""
        both, end = self.layers[layer], self.used + keys.shape[2]
        rows = slice(None) if self.running is None else self.running.to(keys.device)
        for buffer, part in zip(both, (keys, values), strict=True):
            buffer[rows, :, self.used : end] = part
        return tuple(buffer[:, :, :end][rows] for buffer in both)


class PiecePass(PromptPass):
    """Goes on with rows of prompt passes: the followers' pieces, and a place for the rows that follow no more."""

    cache: PieceCache

    def __init__(self, model: Llava, going_on: Sequence[GoingOn], room: int):
        """room: most tokens of the draft that are still to be read. Empties the caches of the prompt passes."""
        parts = []
        for prompt, rows in groupby(going_on, key=lambda each: each.prompt):
            chosen = list(rows)
            parts.append(Part(prompt, [each.row for each in chosen], [each.slots for each in chosen]))
        keep_RL = torch.cat([part.prompt.table.keep_RL[list(part.rows)] for part in parts])
        super().__init__(model, keep_RL, [each.source for each in going_on], [each.join for each in going_on])
        self.slots = [list(range(len(each.slots))) for each in going_on]
        longest = max(map(len, self.slots))
        self.cache = PieceCache(longest + room, longest)
        start = 0
        for part in parts:
            self._take(part, start)
            start += len(part.rows)

    def _take(self, part: Part, start: int) -> None:
        for layer in sorted(part.prompt.cache.layers):
            keeping, taken = part.take(layer)
            part.prompt.cache.layers.pop(layer)
            here = self.table.cached(layer)
            own = torch.isin(start + keeping, here)
            if own.any():
                at = torch.searchsorted(here, start + keeping[own]).to(taken[0].device)
                self.cache.place(layer, len(here), at, *(both[own.to(both.device)] for both in taken))

    def read(self, model: Llava, sources: Sequence[int], followers: Sequence[int], tokens_GQ: torch.Tensor):
        """Return the last hidden states [G + F, Q, D] of a piece, sources first, and the followers as they are given.

        tokens_GQ: what every source, and whoever follows it, reads next.
        """
        order = sorted(range(len(followers)), key=lambda f: int(self.table.join_R[followers[f]]))
        rows = torch.tensor([*sources, *(followers[f] for f in order)])
        place = {row: g for g, row in enumerate(sources)}
        source_A = torch.tensor([place[int(self.table.source_R[row])] for row in rows.tolist()])
        self._rows = rows
        self.running = RowTable(self.table.keep_RL[rows], source_A, self.table.join_R[rows])
        device = tokens_GQ.device
        positions_GQ = torch.tensor([len(self.slots[row]) for row in sources], device=device)[:, None]
        positions_GQ = positions_GQ + torch.arange(tokens_GQ.shape[1], device=device)
        new = range(self.cache.used, self.cache.used + tokens_GQ.shape[1])
        for row in sources:
            self.slots[row].extend(new)
        self._masks = {window: self._mask(sources, positions_GQ, window) for window in set(self.windows)}
        with switched(model, self) as decoder:
            embeds = language_model(model).embed_tokens(tokens_GQ)
            hidden = decode_rows(decoder, embeds, positions_GQ, self.cache, len(rows))
        self.cache.used += tokens_GQ.shape[1]
        back = torch.tensor([*range(len(sources)), *(len(sources) + order.index(f) for f in range(len(followers)))])
        return hidden[back.to(hidden.device)]

    def _mask(self, sources: Sequence[int], positions_GQ: torch.Tensor, window: int | None) -> torch.Tensor:
        """Return which new tokens of every source see which slots, [G, 1, Q, S]."""
        end = self.cache.used + positions_GQ.shape[1]
        age_GS = torch.full((len(sources), end), -1)
        for g, row in enumerate(sources):
            age_GS[g, self.slots[row]] = torch.arange(len(self.slots[row]))
        age_GS = age_GS.to(positions_GQ.device)
        seen = (age_GS[:, None] >= 0) & (age_GS[:, None] <= positions_GQ[..., None])
        if window is not None:
            seen = seen & (positions_GQ[..., None] - age_GS[:, None] < window)
        return seen[:, None]

    def _given(self, index: int, rows: torch.Tensor, kwargs: dict, device: torch.device) -> dict:
        cached, running = self.table.cached(index), self._rows[rows]
        self.cache.running = None if torch.equal(cached, running) else torch.searchsorted(cached, running)
        source = self.running.source_R[rows].to(device)
        mask = self._masks[self.windows[index]]
        given = on_device(kwargs, device, None if mask is None else mask.to(device)[source])
        positions = tuple(part[source] for part in given["position_embeddings"])
        return given | {"position_ids": given["position_ids"][source], "position_embeddings": positions}
