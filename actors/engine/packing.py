"""Inputs that begin alike share a row: what they have in common is read once, the rest of each stands behind it.

Prompts about one image are equal up to the end of the image, and the image is most of them. Behind the common
beginning an input sees that and itself, at the positions that it would have alone, so what is computed is the same.

Example: the inputs [i i i a b] and [i i i c] begin with the same three tokens. They share one row of six tokens, the
shorter one first (shared = 3, starts = [3, 4]); "b" sees "i i i a b", and "c" sees "i i i c":

    slot       0  1  2  3  4  5
    token      i  i  i  c  a  b
    position   0  1  2  3  3  4
    branch    -1 -1 -1  0  1  1

Axes: N inputs, G rows, K inputs of a row, Q tokens of a row, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

MOST_TOGETHER = 8  # inputs of a row: attention is over all its tokens
MOST_PADDING = 1.125  # tokens of a row, against those of the shortest row beside it


@dataclass(frozen=True)
class Layout:
    """Where the tokens of every row of a pass stand: position, and branch, -1 for the beginning."""

    positions_Q: torch.Tensor
    branches_Q: torch.Tensor

    @classmethod
    def plain(cls, count: int) -> "Layout":
        """Return the layout of a single input."""
        return cls(torch.arange(count), torch.zeros(count, dtype=torch.long))

    def mask(self, window: int | None) -> torch.Tensor | None:
        """Return which tokens see which, [1, 1, Q, Q]; None where it is all that came before."""
        short = window is not None and window < len(self.positions_Q)
        if not short and (self.branches_Q == self.branches_Q[0]).all():
            return None
        age_QS = self.positions_Q[:, None] - self.positions_Q[None, :]
        seen_QS = (age_QS >= 0) & (
            (self.branches_Q[None, :] < 0) | (self.branches_Q[:, None] == self.branches_Q[None, :])
        )
        return (seen_QS & (age_QS < window) if short else seen_QS)[None, None]


@dataclass(frozen=True)
class Pack:
    """Inputs in rows of one layout: `shared` common tokens, then branch k of every row from slot starts[k] on.

    rows[g][k] is the number of an input; embeds_GQD holds the rows, padded behind each branch, where nothing sees it.
    """

    rows: list[list[int]]
    shared: int
    starts: list[int]
    layout: Layout
    embeds_GQD: torch.Tensor

    def slots(self, branch: int, count: int) -> list[int]:
        """Return the slots of the first `count` tokens of a row's input number `branch`."""
        return [*range(self.shared), *range(self.starts[branch], self.last(branch, count) + 1)]

    def last(self, branch: int, count: int) -> int:
        """Return the last of these slots."""
        return self.starts[branch] + count - self.shared - 1


def packs(prompts: Sequence[torch.Tensor], fed: Sequence[torch.Tensor]) -> list[Pack]:
    """Put N inputs [tokens, D] into packs; fed[n] begins with prompts[n], whose last token is shared with none."""
    families = [sorted(family, key=lambda n: len(fed[n])) for family in _families(prompts)]
    begins = [_in_common([prompts[n] for n in family]) for family in families]

    def tokens(chosen: Sequence[int]) -> int:
        shared = min(begins[f] for f in chosen)
        lengths = zip(*([len(fed[n]) - shared for n in families[f]] for f in chosen), strict=True)
        return shared + sum(map(max, lengths))

    order = sorted(range(len(families)), key=lambda f: (len(families[f]), tokens([f])))
    groups: list[list[int]] = []
    for f in order:
        last = groups[-1] if groups else []
        alike = last and len(families[last[0]]) == len(families[f])
        if alike and tokens([*last, f]) <= MOST_PADDING * tokens(last[:1]):
            last.append(f)
        else:
            groups.append([f])
    return [_pack([families[f] for f in group], min(begins[f] for f in group), fed) for group in groups]


def _families(prompts: Sequence[torch.Tensor]) -> list[list[int]]:
    """Return the inputs in families whose members begin like the first, for at least half of the longer one."""
    families: list[list[int]] = []
    for n, prompt in enumerate(prompts):
        for family in families:
            first = prompts[family[0]]
            half = (max(len(first), len(prompt)) + 1) // 2
            if len(family) < MOST_TOGETHER and torch.equal(first[:half], prompt[:half]):
                family.append(n)
                break
        else:
            families.append([n])
    return families


def _in_common(prompts: Sequence[torch.Tensor]) -> int:
    """Return how many tokens several prompts begin with, at least the last of each left out; 0 of a single one."""
    first, *others = prompts
    count = min(map(len, prompts)) - 1 if others else 0
    for other in others:
        equal = (first[:count] == other[:count]).all(-1)
        count = int(equal.cumprod(0).sum())
    return count


def _pack(rows: list[list[int]], shared: int, fed: Sequence[torch.Tensor]) -> Pack:
    longest = [max(len(fed[n]) for n in branch) - shared for branch in zip(*rows, strict=True)]
    starts = [shared + sum(longest[:k]) for k in range(len(longest))]
    first = fed[rows[0][0]]
    embeds_GQD = first.new_zeros(len(rows), shared + sum(longest), first.shape[-1])
    for g, row in enumerate(rows):
        embeds_GQD[g, :shared] = fed[row[0]][:shared]
        for start, n in zip(starts, row, strict=True):
            embeds_GQD[g, start : start + len(fed[n]) - shared] = fed[n][shared:]
    positions = torch.cat([torch.arange(shared), *(shared + torch.arange(many) for many in longest)])
    branches = torch.tensor([-1, *range(len(longest))]).repeat_interleave(torch.tensor([shared, *longest]))
    return Pack(rows, shared, starts, Layout(positions, branches), embeds_GQD)
