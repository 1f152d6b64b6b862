"""Greedy answers of one loaded model with any set of decoder layers switched off, row by row.

Removing a layer is a switch, not surgery: a pre-norm decoder layer adds to the residual stream, so a row
without layer b just passes the stream on. One model then answers for all removals in one batch, token for
token what physically pruned models would say. Three more ideas make it fast where layers matter little:

* a variant equals the base below the lowest layer in which they differ, and joins the batch there;
* the base's answer is every variant's draft: one pass over prompt and draft checks it for all variants at once;
* only rows that diverge are decoded, from where they diverge, and leave the batch when they end.

Axes: R rows, N inputs, Q new tokens, D width, L layers.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from actors.loading import language_model
from actors.rows import Part, PromptPass, StepPass, switched
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
def greedy(model: Llava, prompts: Sequence[torch.Tensor], keep_RL: torch.Tensor, limits: Limits) -> list[list[int]]:
    """Greedy answers, one per row; row r uses the layers that keep_RL[r] marks True.

    prompts: R embedded prompts [tokens, D] (image features in place). Returns the new token ids of every row,
    the stop token included if it came; equal to `generate(do_sample=False)` on physically pruned models.
    """
    state = PromptPass(model, keep_RL)
    hidden = state.forward(model, padded(prompts))
    lengths = [len(prompt) for prompt in prompts]
    answers = [found for (found,) in _best_after(model, hidden, range(len(prompts)), lengths, 1)]
    rows = [row for row, token in enumerate(answers) if not limits.ended([token])]
    found = [[token] for token in answers]
    if rows:
        part = Part(state, rows, [lengths[row] for row in rows])
        _continue(model, [part], [found[row] for row in rows], limits)
    return found


@torch.inference_mode()
def verified(
    model: Llava,
    prompts: Sequence[torch.Tensor],
    drafts: Sequence[Sequence[int]],
    base_L: torch.Tensor,
    keep_VL: torch.Tensor,
    limits: Limits,
) -> tuple[list[list[list[int]]], Counter[str]]:
    """Greedy answers of V variants to N prompts, given one draft per prompt; what `greedy` gives, sooner.

    base_L: the layers of the model that the drafts (probably) come from; a variant shares its work below the
    lowest layer in which they differ. Drafts may be wrong, empty or too long. Returns (answers[n][v], counts):
    counts has rows, rows_verified_whole and layer_rows_run of the verifying pass.
    """
    drafts = [limits.cut(draft) for draft in drafts]
    answers: list[list[list[int]]] = [[[] for _ in keep_VL] for _ in prompts]
    open_parts, open_answers = [], []
    counts = Counter(rows=len(prompts) * len(keep_VL), rows_verified_whole=0, layer_rows_run=0)
    for group in _of_like_length([len(p) + len(d) for p, d in zip(prompts, drafts, strict=True)]):
        given = [prompts[n] for n in group], [drafts[n] for n in group]
        state, source, variant, hidden = verify_pass(model, *given, base_L, keep_VL)
        rows = range(len(group), len(source))  # the first rows are the base itself
        lengths = [len(given[0][n]) for n in source]
        longest_draft = max(map(len, given[1]))
        open_rows = []
        for row, found in zip(rows, _best_after(model, hidden, rows, lengths, max(longest_draft, 1)), strict=True):
            draft = given[1][source[row]]
            answer = answers[group[source[row]]][variant[row]] = _accept(draft, found)
            counts["rows_verified_whole"] += answer == draft and limits.ended(answer)
            if not limits.ended(answer):
                open_rows.append(row)
                open_answers.append(answer)
        counts["layer_rows_run"] += state.layer_rows_run
        if open_rows:  # the last token was not fed yet
            kept = [
                lengths[row] + len(a) - 1 for row, a in zip(open_rows, open_answers[-len(open_rows) :], strict=True)
            ]
            open_parts.append(Part(state, open_rows, kept))
    if open_parts:
        _continue(model, open_parts, open_answers, limits)
    return answers, counts


def _of_like_length(lengths: Sequence[int]) -> list[list[int]]:
    """Return the places of `lengths` in groups whose longest is at most an eighth longer than the shortest."""
    groups: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda place: lengths[place]):
        if groups and lengths[place] <= 1.125 * lengths[groups[-1][0]]:
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups


def verify_pass(model, prompts, drafts, base_L, keep_VL):
    """Run prompt and draft of every input, the variants joining where they differ from the base.

    Returns (the pass, source_R, variant_R with -1 for the base itself, hidden states [R, Q, D]). The prompt of row r
    ends at Q index len(prompts[source_R[r]]) - 1, and its draft's tokens but the last stand behind it.
    """
    differs = keep_VL != base_L[None]
    layers = base_L.shape[0]
    # A variant equal to the base joins at the last layer: it needs a row of its own only to be read.
    joins = [int(row.nonzero()[0]) if row.any() else layers - 1 for row in differs]
    order = sorted((join, n, v) for v, join in enumerate(joins) for n in range(len(prompts)))
    source = [*range(len(prompts)), *(n for _, n, _ in order)]
    variant = [*([-1] * len(prompts)), *(v for _, _, v in order)]
    keep = torch.stack([base_L if v < 0 else keep_VL[v] for v in variant])
    join = [*([0] * len(prompts)), *(j for j, _, _ in order)]
    decoder = language_model(model)
    device = prompts[0].device
    fed = [
        torch.cat([prompt, decoder.embed_tokens(torch.tensor(draft[:-1], dtype=torch.long, device=device))])
        for prompt, draft in zip(prompts, drafts, strict=True)  # the last token's successor is never asked for
    ]
    state = PromptPass(model, keep, source, join)
    return state, source, variant, state.forward(model, padded(fed))


def _best_after(model, hidden, rows: range, lengths: Sequence[int], count: int) -> list[list[int]]:
    """Return the best token at each of `count` places from the prompt's end on, for every row."""
    found: list[list[int]] = []
    places_C = torch.arange(count, device=hidden.device)
    step = min(LOGIT_ROWS, max(1, LOGITS_AT_ONCE // (count * model.lm_head.weight.shape[0])))
    for start in range(rows.start, rows.stop, step):
        part = torch.arange(start, min(start + step, rows.stop), device=hidden.device)
        ends = torch.tensor([lengths[row] - 1 for row in part.tolist()], device=hidden.device)
        places = (ends[:, None] + places_C).clamp(max=hidden.shape[1] - 1)  # beyond a short row's draft: never read
        found += model.lm_head(hidden[part[:, None], places]).argmax(-1).tolist()
    return found


def _accept(draft: list[int], found: list[int]) -> list[int]:
    """Return the draft up to its first wrong token, then the right token in its place."""
    for place, token in enumerate(draft):
        if found[place] != token:
            return [*draft[:place], found[place]]
    return list(draft) if draft else [found[0]]


def _continue(model: Llava, parts: Sequence[Part], answers: Sequence[list[int]], limits: Limits) -> None:
    """Extend the answers of all parts' rows in place until they end; the last token of each is the next to feed."""
    room = limits.tokens - min(len(answer) for answer in answers)
    state = StepPass(parts, room, model.lm_head.weight.dtype)
    live = list(answers)
    with switched(model, state) as decoder:
        device = decoder.embed_tokens.weight.device
        positions_R = torch.tensor([kept for part in parts for kept in part.kept], device=device)
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


def padded(prompts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return embeds [N, Q, D], padded on the right: a token's slot is its position."""
    return torch.nn.utils.rnn.pad_sequence(list(prompts), batch_first=True)
