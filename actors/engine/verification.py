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

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from actors.checkpoint.loading import language_model
from actors.engine.packing import Pack, packs
from actors.engine.rows import Part, PromptPass, StepPass, switched
from actors.engine.threads import threads_for
from actors.specs import Llava

LOGIT_ROWS = 64
LOGITS_AT_ONCE = 2**26  # whatever the vocabulary: what no plan of rows counts
KEEP_OPEN = 0.75


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


@torch.inference_mode()
def verify_drafts(
    model: Llava,
    prompts: Sequence[torch.Tensor],
    drafts: Sequence[Sequence[int]],
    base_L: torch.Tensor,
    keep_VL: torch.Tensor,
    limits: Limits,
) -> tuple[list[list[list[int]]], Counter[str]]:
    """Greedy answers of V variants to N prompts, given one draft per prompt.

    prompts: N embedded prompts [tokens, D] (image features in place). drafts: what the answers (probably) are, [] where
    nothing is known; wrong ones or too long ones cost time only. base_L: the layers of the model that they come from; a
    variant, that keeps the layers keep_VL[v], shares its work below the lowest layer in which the two differ. Returns
    (answers[n][v], counts): new token ids, the stop token included if it came, equal to `generate(do_sample=False)` on
    physically pruned models; counts has rows, rows_verified_whole, and of the verifying passes layer_rows_run and
    layer_tokens_run.
    """
    drafts = [limits.cut(draft) for draft in drafts]
    answers: list[list[list[int]]] = [[[] for _ in keep_VL] for _ in prompts]
    parts, open_answers = [], []
    counts = Counter(rows=len(prompts) * len(keep_VL), rows_verified_whole=0, layer_rows_run=0, layer_tokens_run=0)
    for pack in pack_prompts(model, prompts, drafts):
        check = Verification(model, pack, prompts, base_L, keep_VL)
        asked = [(n, v) for n in check.inputs for v in range(len(keep_VL))]
        count = max(1, *(len(drafts[n]) for n in check.inputs))
        rows, slots = [], []
        for (n, v), predicted in zip(asked, _predict_after(model, check, asked, count), strict=True):
            answer = answers[n][v] = _accept(drafts[n], predicted)
            counts["rows_verified_whole"] += answer == drafts[n] and limits.ended(answer)
            if not limits.ended(answer):  # its last token was not fed yet
                rows.append(check.row(n, v))
                slots.append(check.slots(n, len(prompts[n]) + len(answer) - 1))
                open_answers.append(answer)
        counts["layer_rows_run"] += check.state.layer_rows_run
        counts["layer_tokens_run"] += check.state.layer_rows_run * pack.embeds_GQD.shape[1]
        if rows:
            parts.append(Part(check.state, rows, slots))
    if parts:
        vocabulary, width = model.lm_head.weight.shape
        with threads_for(len(open_answers), width, max(vocabulary, language_model(model).config.intermediate_size)):
            _continue(model, parts, open_answers, limits)
    return answers, counts


def pack_prompts(model: Llava, prompts: Sequence[torch.Tensor], drafts: Sequence[Sequence[int]]) -> list[Pack]:
    """Return the packs of all prompts, each with its draft but for the last token: what follows that is never asked."""
    embed = language_model(model).embed_tokens
    fed = [
        torch.cat([prompt, embed(torch.tensor(draft[:-1], dtype=torch.long, device=embed.weight.device))])
        for prompt, draft in zip(prompts, drafts, strict=True)
    ]
    return packs(prompts, fed)


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
    differs = (keep_VL != base_L[None]).tolist()
    row_of = {(g, v): g for v, row in enumerate(differs) if not any(row) for g in range(groups)}
    joins = sorted((row.index(True), v) for v, row in enumerate(differs) if any(row))
    joining = [(layer, g, v) for layer, v in joins for g in range(groups)]
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

    def slots(self, n: int, count: int) -> list[int]:
        """Return where the first `count` tokens of an input stand in its row."""
        return self._pack.slots(self._place[n][1], count)

    def end(self, n: int) -> int:
        """Return the slot of the last token of an input's prompt; its draft stands behind it."""
        return self._pack.last(self._place[n][1], len(self._prompts[n]))


def _predict_after(model: Llava, check: Verification, asked: Sequence[tuple[int, int]], count: int) -> list[list[int]]:
    """Return the best token at each of `count` places from the prompt's end on, for inputs and variants."""
    predicted: list[list[int]] = []
    hidden = check.hidden_RQD
    places_C = torch.arange(count, device=hidden.device)
    step = min(LOGIT_ROWS, max(1, LOGITS_AT_ONCE // (count * model.lm_head.weight.shape[0])))
    for start in range(0, len(asked), step):
        part = asked[start : start + step]
        rows = torch.tensor([check.row(n, v) for n, v in part], device=hidden.device)
        ends = torch.tensor([check.end(n) for n, _ in part], device=hidden.device)
        places = (ends[:, None] + places_C).clamp(max=hidden.shape[1] - 1)  # beyond a shorter draft: never read
        predicted += model.lm_head(hidden[rows[:, None], places]).argmax(-1).tolist()
    return predicted


def _accept(draft: Sequence[int], predicted: list[int]) -> list[int]:
    """Return the draft up to its first wrong token, then the right token in its place."""
    for place, token in enumerate(draft):
        if predicted[place] != token:
            return [*draft[:place], predicted[place]]
    return list(draft) if draft else [predicted[0]]


def _continue(model: Llava, parts: Sequence[Part], answers: Sequence[list[int]], limits: Limits) -> None:
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
            if sum(open_rows) <= KEEP_OPEN * len(live):  # dropping rows copies the cache: not for every single one
                active = torch.tensor(open_rows, device=device)
                state.drop(active)
                positions_R = positions_R[active]
                live = [answer for answer, on in zip(live, open_rows, strict=True) if on]
            tokens = torch.tensor([answer[-1] for answer in live], device=device)
            hidden = state.forward(decoder, tokens, positions_R)
            for answer, token in zip(live, model.lm_head(hidden).argmax(-1).tolist(), strict=True):
                if not limits.ended(answer):
                    answer.append(token)
            positions_R = positions_R + 1
