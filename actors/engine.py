"""Greedy answers of one loaded model with any set of decoder layers switched off, row by row.

Removing a layer is a switch, not surgery: a pre-norm decoder layer adds to the residual stream, so a row
without layer b just passes the stream on. One model then answers for all removals in one batch, token for
token what physically pruned models would say. Three more ideas make it fast where layers matter little:

* a variant equals the base below the lowest layer in which they differ, and joins the batch there;
* the base's answer is every variant's draft: one pass over prompt and draft checks it for all variants at once;
* only rows that diverge are decoded, from where they diverge, and leave the batch when they end.

Axes: R rows, N inputs, Q new tokens, D width, L layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from actors.loading import language_model
from actors.rows import RowPass, run_tokens
from actors.specs import Llava

LOGIT_ROWS = 64
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
    embeds, positions, valid = padded(prompts)
    state = RowPass.over(model, keep_RL, embeds.shape[1] + limits.tokens, embeds.device)
    hidden = run_tokens(model, state, embeds, positions, valid)
    answers = [[token] for token in _best_tokens(model, hidden[:, -1])]
    _decode(model, state, answers, positions[:, -1] + 1, limits)
    return answers


@torch.inference_mode()
def first_logits(model: Llava, prompts: Sequence[torch.Tensor], keep_RL: torch.Tensor) -> torch.Tensor:
    """Logits [R, V] of every row's first new token; arguments as of `greedy`."""
    embeds, positions, valid = padded(prompts)
    state = RowPass.over(model, keep_RL, embeds.shape[1], embeds.device)
    return model.lm_head(run_tokens(model, state, embeds, positions, valid)[:, -1])


@torch.inference_mode()
def verified(
    model: Llava,
    prompts: Sequence[torch.Tensor],
    drafts: Sequence[Sequence[int]],
    base_L: torch.Tensor,
    keep_VL: torch.Tensor,
    limits: Limits,
) -> tuple[list[list[list[int]]], dict[str, int]]:
    """Greedy answers of V variants to N prompts, given one draft per prompt; what `greedy` gives, sooner.

    base_L: the layers of the model that the drafts (probably) come from; a variant shares its work below the
    lowest layer in which they differ. Drafts may be wrong, empty or too long. Returns (answers[n][v], counts):
    counts has rows, rows_verified_whole and layer_rows_run of the verifying pass.
    """
    drafts = [limits.cut(draft) for draft in drafts]
    state, source, variant, hidden, lengths = verify_pass(model, prompts, drafts, base_L, keep_VL, limits)
    inputs = len(prompts)
    rows = range(inputs, len(source))  # the first N rows are the base itself
    longest_draft = max((len(draft) for draft in drafts), default=0)
    answers: dict[int, list[int]] = {}
    for row, found in zip(rows, _row_tokens(model, hidden, rows, longest_draft), strict=True):
        answers[row] = _accept(drafts[source[row]], found)
    whole = sum(answers[row] == drafts[source[row]] and limits.ended(answers[row]) for row in rows)
    open_rows = [row for row in rows if not limits.ended(answers[row])]
    if open_rows:
        later = _continued(state, open_rows, [answers[r] for r in open_rows], lengths, longest_draft, limits)
        starts = torch.tensor([lengths[source[r]] + len(answers[r]) - 1 for r in open_rows], device=state.device)
        _decode(model, later, [answers[r] for r in open_rows], starts, limits)
    result: list[list[list[int]]] = [[[] for _ in keep_VL] for _ in prompts]
    for row in rows:
        result[source[row]][variant[row]] = answers[row]
    counts = {"rows": len(rows), "rows_verified_whole": whole, "layer_rows_run": state.layer_rows_run}
    return result, counts


def verify_pass(model, prompts, drafts, base_L, keep_VL, limits):
    """Run prompt and draft of every input, the variants joining where they differ from the base.

    Returns (the pass, source_R, variant_R with -1 for the base itself, hidden states [R, Q, D], prompt lengths).
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
    embeds, positions, valid = padded(prompts)
    fed = max((len(draft) for draft in drafts), default=0) - 1  # the last token's successor is never asked for
    if fed > 0:
        ids = torch.zeros(len(prompts), fed, dtype=torch.long, device=embeds.device)
        known = torch.zeros(len(prompts), fed, dtype=torch.bool, device=embeds.device)
        for row, draft in enumerate(drafts):
            part = torch.tensor(draft[:fed], dtype=torch.long, device=embeds.device)
            ids[row, : len(part)], known[row, : len(part)] = part, True
        after = positions[:, -1:] + 1 + torch.arange(fed, device=embeds.device)
        embeds = torch.cat([embeds, decoder.embed_tokens(ids)], dim=1)
        positions, valid = torch.cat([positions, after], dim=1), torch.cat([valid, known], dim=1)
    state = RowPass.over(model, keep, embeds.shape[1], embeds.device, source_R=source, join_R=join)
    hidden = run_tokens(model, state, embeds, positions, valid)
    return state, source, variant, hidden, [len(prompt) for prompt in prompts]


def _row_tokens(model, hidden, rows, longest_draft) -> list[list[int]]:
    """Return for every row the best token after the prompt and after each draft token but the last."""
    count = max(longest_draft, 1)
    first = rows.start
    found: list[list[int]] = []
    for start in range(first, rows.stop, LOGIT_ROWS):
        part = hidden[start : min(start + LOGIT_ROWS, rows.stop), -count:]
        found += model.lm_head(part).argmax(-1).tolist()
    return found


def _accept(draft: list[int], found: list[int]) -> list[int]:
    """Return the draft up to its first wrong token, then the right token in its place."""
    for place, token in enumerate(draft):
        if found[place] != token:
            return [*draft[:place], found[place]]
    return list(draft) if draft else [found[0]]


def _continued(state: RowPass, rows, answers, lengths, longest_draft, limits: Limits) -> RowPass:
    """Return the pass that goes on with the chosen rows: their caches without the slots of refused tokens."""
    room = limits.tokens - min(len(answer) for answer in answers)
    cache = state.cache.gathered(state.places(rows), state.cache.used + room)
    later = RowPass(state.keep_RL[rows], state.windows, cache, state.device, state.devices)
    inputs = torch.tensor([state.source_R[row] for row in rows], device=state.device)
    later.key_positions_NS = state.key_positions_NS[inputs].clone()
    later.key_valid_NS = state.key_valid_NS[inputs].clone()
    prompt_slots = state.cache.used - max(longest_draft - 1, 0)
    for row, answer in enumerate(answers):
        later.key_valid_NS[row, prompt_slots + len(answer) - 1 :] = False
    return later


def _decode(model: Llava, state: RowPass, answers: list[list[int]], positions_R: torch.Tensor, limits: Limits) -> None:
    """Extend every answer in place until it ends; answers[r][-1] is the next token to feed, at positions_R[r]."""
    live = list(range(len(answers)))
    decoder = language_model(model)
    while True:
        open_rows = [not limits.ended(answers[row]) for row in live]
        if not any(open_rows):
            return
        if sum(open_rows) <= KEEP_OPEN * len(live):  # dropping rows copies the cache: not for every single one
            active = torch.tensor(open_rows, device=state.device)
            state.drop(active)
            positions_R = positions_R[active]
            live = [row for row, on in zip(live, open_rows, strict=True) if on]
        tokens = torch.tensor([answers[row][-1] for row in live], device=state.device)
        valid = torch.ones(len(live), 1, dtype=torch.bool, device=state.device)
        hidden = run_tokens(model, state, decoder.embed_tokens(tokens)[:, None], positions_R[:, None], valid)
        for row, token in zip(live, _best_tokens(model, hidden[:, -1]), strict=True):
            if not limits.ended(answers[row]):
                answers[row].append(token)
        positions_R = positions_R + 1


def _best_tokens(model: Llava, hidden_RD: torch.Tensor) -> list[int]:
    return model.lm_head(hidden_RD).argmax(-1).tolist()


def padded(prompts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return embeds [N, Q, D], positions and validity [N, Q], padded on the left: the last slot is the last token."""
    device, dtype = prompts[0].device, prompts[0].dtype
    longest = max(map(len, prompts))
    embeds = torch.zeros(len(prompts), longest, prompts[0].shape[-1], device=device, dtype=dtype)
    valid = torch.zeros(len(prompts), longest, dtype=torch.bool, device=device)
    for row, prompt in enumerate(prompts):
        embeds[row, longest - len(prompt) :] = prompt
        valid[row, longest - len(prompt) :] = True
    return embeds, (valid.long().cumsum(1) - 1).clamp(min=0), valid
