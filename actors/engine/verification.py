"""One pass over prompts and drafts, for a base and for variants of it: which rows it runs, and where tokens stand.

Axes: R rows, G rows of inputs, N inputs, V variants, Q new tokens, D width, L layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from actors.checkpoint.loading import language_model
from actors.engine.packing import Pack, packs
from actors.engine.rows import PromptPass
from actors.specs import Llava

LOGITS_AT_ONCE = 2**26  # whatever the vocabulary: what no plan of rows counts


def pack_prompts(model: Llava, prompts: Sequence[torch.Tensor], drafts: Sequence[Sequence[int]]) -> list[Pack]:
    """Return the packs of all prompts, each with its draft but for the last token: what follows that is never asked."""
    embed = language_model(model).embed_tokens
    fed = [
        torch.cat([prompt, embed(torch.tensor(draft[:-1], dtype=torch.long, device=embed.weight.device))])
        for prompt, draft in zip(prompts, drafts, strict=True)
    ]
    return packs(prompts, fed)


def join_layers(base_L: torch.Tensor, keep_VL: torch.Tensor) -> list[int]:
    """Return the lowest layer in which each variant differs from the base; L where it is the base."""
    return [row.index(True) if any(row) else len(row) for row in (keep_VL != base_L).tolist()]


@dataclass(frozen=True)
class RowPlan:
    """Which rows a verifying pass runs: the base of every row of inputs first, then what differs from it, by layer.

    row_of[g, v]: the row of variant v of the inputs in row g. keep_RL, source_R, join_R: see PromptPass. Example: two
    rows of inputs, four layers, a base that keeps all, and three variants: v0 without layer 2, v1 the base itself, v2
    without layer 1. Six rows run, the last two of them only layer 3 on their own:

        row  inputs  layers     source  joins at  row_of
        0    g = 0   0 1 2 3    0       0         (0, v1)
        1    g = 1   0 1 2 3    1       0         (1, v1)
        2    g = 0   0   2 3    0       1         (0, v2)
        3    g = 1   0   2 3    1       1         (1, v2)
        4    g = 0   0 1   3    0       2         (0, v0)
        5    g = 1   0 1   3    1       2         (1, v0)
    """

    row_of: dict[tuple[int, int], int]
    keep_RL: torch.Tensor
    source_R: list[int]
    join_R: list[int]


def plan_rows(groups: int, base_L: torch.Tensor, keep_VL: torch.Tensor) -> RowPlan:
    """Return the rows for V variants of `groups` rows of inputs."""
    joins = join_layers(base_L, keep_VL)
    row_of = {(g, v): g for v, join in enumerate(joins) if join == len(base_L) for g in range(groups)}
    ordered = sorted((join, v) for v, join in enumerate(joins) if join < len(base_L))
    joining = [(layer, g, v) for layer, v in ordered for g in range(groups)]
    row_of |= {(g, v): row for row, (_, g, v) in enumerate(joining, start=groups)}
    keep_RL = torch.cat([base_L.repeat(groups, 1), keep_VL[[v for _, _, v in joining]]])
    source_R = [*range(groups), *(g for _, g, _ in joining)]
    return RowPlan(row_of, keep_RL, source_R, [*([0] * groups), *(layer for layer, _, _ in joining)])


class Verification:
    """One pass over prompts and drafts, for the base and for variants that join where they differ from it."""

    def __init__(self, model: Llava, pack: Pack, prompts: Sequence[torch.Tensor], base_L, keep_VL: torch.Tensor):
        self._pack, self._prompts = pack, prompts
        self._place = {n: (g, k) for g, row in enumerate(pack.rows) for k, n in enumerate(row)}
        plan = plan_rows(len(pack.rows), base_L, keep_VL)
        self._row_of = plan.row_of
        self.state = PromptPass(model, plan.keep_RL, plan.source_R, plan.join_R)
        self.hidden_RQD = self.state.forward(model, pack.embeds_GQD, pack.layout)

    @property
    def inputs(self) -> list[int]:
        """Return the numbers of the pack's inputs."""
        return list(self._place)

    def row(self, n: int, variant: int) -> int:
        """Return the row of an input and a variant."""
        return self._row_of[self._place[n][0], variant]

    def base_row(self, n: int) -> int:
        """Return the row of an input and the base."""
        return self._place[n][0]

    def slots(self, n: int, count: int) -> list[int]:
        """Return where the first `count` tokens of an input stand in its row."""
        return self._pack.slots(self._place[n][1], count)

    def end(self, n: int) -> int:
        """Return the slot of the last token of an input's prompt; its draft stands behind it."""
        return self._pack.last(self._place[n][1], len(self._prompts[n]))
