"""Greedy answers of one loaded model with any set of decoder layers switched off, row by row.

Removing a layer is a switch, not surgery: a pre-norm decoder layer adds to the residual stream, so a row
without layer b just passes the stream on. One model then answers for all removals in one batch, token for
token what physically pruned models would say. More ideas make it fast where layers matter little:

* a variant equals the base below the lowest layer in which they differ, and joins the batch there;
* the base's answer is every variant's draft: one pass over prompt and draft checks it for all variants at once, and
  reads what prompts have in common (their image) once;
* only rows that diverge are decoded, from where they diverge, and leave the batch when they end.

Axes: R rows, G rows of inputs, N inputs, V variants, Q new tokens, D width, L layers.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import torch

from actors.checkpoint.loading import language_model
from actors.engine.pace import Pace, WholeDrafts
from actors.engine.packing import packs
from actors.engine.pieces import GoingOn, PiecePass
from actors.engine.rows import Part, PromptPass
from actors.engine.steps import Limits, decode
from actors.engine.threads import threads_for
from actors.engine.verification import LOGITS_AT_ONCE, Verification, join_layers, pack_prompts
from actors.specs import Llava

LOGIT_ROWS = 64


@torch.inference_mode()
def verify_drafts(
    model: Llava,
    prompts: Sequence[torch.Tensor],
    drafts: Sequence[Sequence[int]],
    base_L: torch.Tensor,
    keep_VL: torch.Tensor,
    limits: Limits,
    pace: Pace | None = None,
) -> tuple[list[list[list[int]]], Counter[str]]:
    """Greedy answers of V variants to N prompts, given one draft per prompt.

    prompts: N embedded prompts [tokens, D] (image features in place). drafts: what the answers (probably) are, [] where
    nothing is known; wrong ones or too long ones cost time only. base_L: the layers of the model that they come from; a
    variant, that keeps the layers keep_VL[v], shares its work below the lowest layer in which the two differ. pace:
    what earlier calls measured; it sets how much of a draft is read at once. Without it a draft is read whole.

    Returns (answers[n][v], counts): new token ids, the stop token included if it came, equal to
    `generate(do_sample=False)` on physically pruned models; counts has rows, rows_verified_whole, and of the verifying
    passes layer_rows_run and layer_tokens_run.
    """
    drafts = [limits.cut(draft) for draft in drafts]
    return _Answering(model, prompts, drafts, base_L.cpu(), keep_VL.cpu(), limits, pace).run()


def drafts_pay(
    pace: Pace, prompts: Sequence[torch.Tensor], guessed: bool, base_L: torch.Tensor, keep_VL: torch.Tensor, tokens: int
) -> bool:
    """Tell whether finding the base's answers first, as drafts, is expected to cost less than answering all at once."""
    shares, layers = shares_of(base_L, keep_VL), len(base_L)
    others = [v for v, join in enumerate(join_layers(base_L, keep_VL)) if join < layers]
    widths = {bytes(keep_VL[v].tolist()): shares[v] for v in others}
    base = bytes(base_L.tolist()) if guessed else None
    read = sum(pack.embeds_GQD.shape[0] * pack.embeds_GQD.shape[1] for pack in packs(prompts, prompts))
    return pace.drafts_pay(base, widths, len(prompts), read, tokens)


def shares_of(base_L: torch.Tensor, keep_VL: torch.Tensor) -> list[float]:
    """Return what share of the layers runs for a token of each variant while it follows its base."""
    return [int(row[join:].sum()) / len(row) for row, join in zip(keep_VL, join_layers(base_L, keep_VL), strict=True)]


@dataclass(frozen=True)
class _Open:
    """An answer that goes on, to input n by variant v: its row in a pass, and the slots there of what it has read."""

    n: int
    v: int
    row: int
    slots: list[int]


class _Answering:
    """One call of `verify_drafts`: a pass over the prompts, pieces of the drafts, then steps for what left them."""

    def __init__(self, model: Llava, prompts, drafts, base_L, keep_VL, limits: Limits, pace: Pace | None):
        self.model, self.prompts, self.drafts, self.limits = model, prompts, drafts, limits
        self.pace = pace or WholeDrafts()
        self.base_L, self.keep_VL, self.layers = base_L, keep_VL, len(base_L)
        self.variants = [bytes(row.tolist()) for row in keep_VL]
        self.joins = join_layers(base_L, keep_VL)
        self.base_share, self.shares = int(base_L.sum()) / self.layers, shares_of(base_L, keep_VL)
        self.answers: list[list[list[int]]] = [[[] for _ in keep_VL] for _ in prompts]
        self.checked = 0  # tokens of their drafts that all followers have been found to say
        self.counts = Counter(
            rows=len(prompts) * len(keep_VL), rows_verified_whole=0, layer_rows_run=0, layer_tokens_run=0
        )

    def run(self) -> tuple[list[list[list[int]]], Counter[str]]:
        """Return (answers, counts) of `verify_drafts`."""
        read = self._read_prompts()
        steps: list[tuple[PromptPass, list[_Open]]]
        if any(following for _, following, _ in read):
            steps = [self._read_pieces(read)]
        else:
            steps = [(check.state, left) for check, _, left in read if left]
        parts = [
            Part(state, [each.row for each in rows], [each.slots for each in rows]) for state, rows in steps if rows
        ]
        live = [self.answers[each.n][each.v] for _, rows in steps for each in rows]
        if parts:
            vocabulary, width = self.model.lm_head.weight.shape
            widest = max(vocabulary, language_model(self.model).config.intermediate_size)
            with threads_for(len(live), width, widest):
                decode(self.model, parts, live, self.limits, self.pace)
        self._note_answers()
        return self.answers, self.counts

    def _read_prompts(self) -> list[tuple[Verification, list[_Open], list[_Open]]]:
        """Read the prompts and the first pieces; return, by pass, the answers that follow and those that left."""
        everyone = [variant for _ in self.prompts for variant in self.variants]
        room = max(1, *map(len, self.drafts))
        width = len(self.prompts) * (self.base_share + sum(self.shares))
        self.checked = self.pace.length(everyone, width, room, first=True, alone=False)
        pieces = [draft[: self.checked] for draft in self.drafts]
        read = []
        for pack in pack_prompts(self.model, self.prompts, pieces):
            began = time.perf_counter()
            check = Verification(self.model, pack, self.prompts, self.base_L, self.keep_VL)
            asked = [(n, v) for n in check.inputs for v in range(len(self.variants))]
            count = max(1, *(len(pieces[n]) for n in check.inputs))
            rows, ends = [check.row(n, v) for n, v in asked], [check.end(n) for n, _ in asked]
            predicted = _best_tokens(self.model, check.hidden_RQD, rows, ends, count)
            del check.hidden_RQD
            self._note(check.state.layer_rows_run, pack.embeds_GQD.shape[1], began)
            following: list[_Open] = []
            left: list[_Open] = []
            for (n, v), row, tokens in zip(asked, rows, predicted, strict=True):
                follows = self._settle(n, v, 0, tokens)
                answer = self.answers[n][v]
                if follows or not self.limits.ended(answer):  # its last token was not read yet
                    slots = check.slots(n, len(self.prompts[n]) + len(answer) - 1)
                    (following if follows else left).append(_Open(n, v, row, slots))
            read.append((check, following, left))
        return read

    def _read_pieces(self, read) -> tuple[PiecePass, list[_Open]]:
        """Read the drafts on, piece by piece, until nobody follows; return the pass and the answers that left."""
        state, followers, left = self._gather(read)
        while followers:
            variants = [self.variants[each.v] for each in followers]
            sources = sorted({int(state.table.source_R[each.row]) for each in followers})
            drafts = {int(state.table.source_R[each.row]): self.drafts[each.n] for each in followers}
            width = len(sources) * self.base_share + sum(self.shares[each.v] for each in followers)
            room = max(map(len, drafts.values())) - self.checked
            length = self.pace.length(variants, width, room, first=False, alone=not left)
            if not length:
                break
            began, rows_before = time.perf_counter(), state.layer_rows_run
            fed = [drafts[row][self.checked - 1 : self.checked - 1 + length] for row in sources]
            tokens_GQ = torch.tensor([[*piece, *[0] * (length - len(piece))] for piece in fed])
            own = [each.row for each in followers if each.row not in drafts]
            hidden = state.read(self.model, sources, own, tokens_GQ.to(self.model.lm_head.weight.device))
            place = {row: r for r, row in enumerate([*sources, *own])}
            rows = [place[each.row] for each in followers]
            predicted = _best_tokens(self.model, hidden, rows, [0] * len(rows), length)
            self._note(state.layer_rows_run - rows_before, length, began)
            still = []
            for each, tokens in zip(followers, predicted, strict=True):
                follows = self._settle(each.n, each.v, self.checked, tokens)
                if follows:
                    still.append(each)
                elif not self.limits.ended(answer := self.answers[each.n][each.v]):
                    slots = state.slots[int(state.table.source_R[each.row])]
                    left.append(replace(each, slots=slots[: len(self.prompts[each.n]) + len(answer) - 1]))
            followers, self.checked = still, self.checked + length
        return state, left + [
            replace(each, slots=list(state.slots[int(state.table.source_R[each.row])])) for each in followers
        ]

    def _gather(self, read) -> tuple[PiecePass, list[_Open], list[_Open]]:
        """Bring everything that goes on into one pass: the followers' bases, the followers, and those that left."""
        rows: list[GoingOn] = []
        followers, left = [], []

        def add(state: PromptPass, row: int, slots: list[int], join: int = 0, source: int | None = None) -> int:
            rows.append(GoingOn(state, row, slots, join, len(rows) if source is None else source))
            return len(rows) - 1

        for check, following, leaving in read:
            bases: dict[int, int] = {}
            for each in following:
                if each.n not in bases:
                    bases[each.n] = add(check.state, check.base_row(each.n), each.slots)
                place = bases[each.n]
                if each.row != check.base_row(each.n):
                    place = add(check.state, each.row, each.slots, self.joins[each.v], place)
                followers.append(replace(each, row=place))
            for each in leaving:
                place = add(check.state, each.row, each.slots)
                left.append(replace(each, row=place, slots=list(range(len(each.slots)))))
        room = max(len(self.drafts[each.n]) for each in followers) - self.checked
        return PiecePass(self.model, rows, room), followers, left

    def _settle(self, n: int, v: int, checked: int, predicted: list[int]) -> bool:
        """Set an answer by what was predicted from place `checked` of its draft on; tell whether it still follows."""
        draft = self.drafts[n]
        piece = draft[checked : checked + len(predicted)]
        right = next((i for i, token in enumerate(piece) if predicted[i] != token), len(piece))
        if not piece or right < len(piece):
            self.answers[n][v][:] = [*draft[: checked + right], predicted[right]]
        else:
            self.answers[n][v][:] = draft[: checked + right]
        if piece:
            self.pace.note_draft(self.variants[v], right, right < len(piece), self.joins[v] < self.layers)
        whole = bool(piece) and checked + right == len(draft)
        self.counts["rows_verified_whole"] += whole and self.limits.ended(draft)
        return bool(piece) and right == len(piece) and not whole

    def _note_answers(self) -> None:
        """Note how long the answers are, and, where there were no drafts, how far the base's answers would have led."""
        for variants in self.answers:
            for answer in variants:
                self.pace.note_answer(len(answer))
            if any(self.drafts) or self.layers not in self.joins:
                continue
            draft = variants[self.joins.index(self.layers)]
            for v, answer in enumerate(variants):
                if self.joins[v] < self.layers:
                    same = (a == b for a, b in zip(draft, answer, strict=False))
                    right = sum(takewhile(bool, same))
                    self.pace.note_draft(self.variants[v], right, right < len(draft))

    def _note(self, layer_rows: int, tokens: int, began: float) -> None:
        self.counts["layer_rows_run"] += layer_rows
        self.counts["layer_tokens_run"] += layer_rows * tokens
        self.pace.note_pass(layer_rows * tokens / self.layers, time.perf_counter() - began)


def _best_tokens(model: Llava, hidden_RQD: torch.Tensor, rows: list[int], starts: list[int], count: int):
    """Return the best token at each of `count` places of `rows`, from the row's start on."""
    best: list[list[int]] = []
    device = hidden_RQD.device
    places_C = torch.arange(count, device=device)
    rows_A, starts_A = torch.tensor(rows, device=device), torch.tensor(starts, device=device)
    step = min(LOGIT_ROWS, max(1, LOGITS_AT_ONCE // (count * model.lm_head.weight.shape[0])))
    for a in range(0, len(rows), step):
        places = (starts_A[a : a + step, None] + places_C).clamp(max=hidden_RQD.shape[1] - 1)  # beyond: never read
        best += model.lm_head(hidden_RQD[rows_A[a : a + step, None], places]).argmax(-1).tolist()
    return best
