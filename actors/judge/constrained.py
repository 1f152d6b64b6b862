"""Greedy decoding of a batch of prompts, with each output constrained to a JSON schema.

After each token llguidance tells which tokens may follow. It also fixes the order of the properties and compact
spacing, so that a label which the schema names last is written last.
Axes: R rows, T tokens, V vocabulary, K labels.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer

from actors.judge.prefix import SharedPrefix

LABELS = ("0", "1", "2", "3", "4")


@dataclass(frozen=True)
class Task:
    """One output to write: the prompt's token ids, the schema ("": any text), the longest output (tokens).

    prefix: the tokens at the prompt's beginning that it shares with other prompts; empty if they are not known.
    """

    prompt: list[int]
    schema: str
    max_tokens: int
    prefix: list[int]


@dataclass(frozen=True)
class Output:
    """One output: its tokens with their log-probabilities, and the labels' probabilities.

    pieces: the tokens' texts; logprobs: of each token under the model, before the constraint; label_at: the label's
    index among the tokens (None: it is not one token); probabilities: of the labels 0-4 there, before the constraint;
    cut: the output was ended by its longest length.
    """

    ids: list[int]
    pieces: list[str]
    text: str
    logprobs: list[float]
    label_at: int | None
    probabilities: tuple[float, ...] | None
    cut: bool


class Grammars:
    """Makes the matcher of a schema; a schema is compiled once.

    vocabulary: the model's number of logits. ValueError: llguidance cannot read the tokenizer.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, stops: Sequence[int]):
        try:
            self.tokens: LLTokenizer = from_tokenizer(tokenizer, n_vocab=vocabulary, eos_token=list(stops))
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"The judge's tokenizer cannot be constrained by llguidance: {reason}") from None
        self.labels = _label_ids(self.tokens)
        self._compiled: dict[str, LLMatcher] = {}

    def matcher(self, schema: str) -> LLMatcher:
        """Return a new matcher of a JSON schema (as text: the order of its keys counts); ValueError: it is invalid.

        That of "" allows any text without control tokens, up to a token that ends the output.
        """
        if schema not in self._compiled:
            if schema:
                grammar = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})
            else:
                grammar = LLMatcher.grammar_from_regex("(?s:.*)")
            compiled = LLMatcher(self.tokens, grammar, log_level=0)
            if compiled.is_error():
                raise ValueError(f"The output's JSON schema cannot be used: {compiled.get_error()[:200]}")
            self._compiled[schema] = compiled
        return self._compiled[schema].deep_copy()


def schema_text(schema: dict[str, Any]) -> str:
    """Return a schema as text, in the order of its keys."""
    return json.dumps(schema, ensure_ascii=False)


def _label_ids(tokens: LLTokenizer) -> list[int] | None:
    """Return the token ids of the labels, or None if a label is not a single token."""
    ids = [tokens.tokenize_str(label) for label in LABELS]
    return [label_tokens[0] for label_tokens in ids] if all(len(label_tokens) == 1 for label_tokens in ids) else None


@torch.inference_mode()
def write(model: Any, grammars: Grammars, tasks: Sequence[Task], pad: int, shared: SharedPrefix) -> list[Output]:
    """Return the greedy output of every task. RuntimeError: logits that are not finite.

    Masked padding stands between the shared prefix and each row's own tokens; in float32 a row's output does not depend
    on the other rows.
    """
    matchers = [grammars.matcher(task.schema) for task in tasks]
    cache, cached = shared.begin([task.prompt for task in tasks], tasks[0].prefix)
    suffixes = [task.prompt[cached:] for task in tasks]
    longest = max(map(len, suffixes))
    ids_RT = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in suffixes], device=model.device)
    mask_RT = torch.tensor(
        [[1] * cached + [0] * (longest - len(ids)) + [1] * len(ids) for ids in suffixes], device=model.device
    )
    rows = [_Row() for _ in tasks]
    open_rows = set(range(len(tasks)))
    while True:
        positions_RT = (mask_RT.cumsum(-1) - 1).clamp(min=0)[:, -ids_RT.shape[1] :]
        out = model(
            input_ids=ids_RT,
            attention_mask=mask_RT,
            position_ids=positions_RT,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        chosen = _choose(out.logits[:, -1].float(), matchers, rows, open_rows, grammars)
        for number in sorted(open_rows):
            token, matcher = chosen[number], matchers[number]
            if not matcher.consume_token(token):
                raise RuntimeError(f"The judge's constraint failed: {matcher.get_error()[:200]}")
            if matcher.is_stopped() or len(rows[number].ids) >= tasks[number].max_tokens:
                open_rows.discard(number)
        if not open_rows:
            pairs = zip(rows, matchers, strict=True)
            return [row.finish(grammars, not matcher.is_stopped()) for row, matcher in pairs]
        ids_RT = torch.tensor(chosen, device=model.device).unsqueeze(1)
        mask_RT = torch.cat([mask_RT, mask_RT.new_ones(len(tasks), 1)], dim=1)


def _choose(
    logits_RV: torch.Tensor, matchers: list[LLMatcher], rows: list["_Row"], open_rows: set[int], grammars: Grammars
) -> list[int]:
    """Return the likeliest allowed token of every row, and record its and the labels' probability in the open rows."""
    total_R = logits_RV.logsumexp(-1)
    if not torch.isfinite(total_R).all():
        raise RuntimeError("The judge's logits are infinite or not numbers: its weights, or its dtype, are broken.")
    allowed_RV = _allowed_mask(matchers, open_rows, logits_RV.shape[1]).to(logits_RV.device)
    chosen_R = logits_RV.masked_fill(~allowed_RV, -torch.inf).argmax(-1)
    logprobs_R = logits_RV.gather(-1, chosen_R.unsqueeze(-1)).squeeze(-1) - total_R
    labels_RK = None
    if grammars.labels is not None:
        labels_RK = (logits_RV[:, grammars.labels] - total_R.unsqueeze(-1)).double().exp().tolist()
    chosen, best = chosen_R.tolist(), logprobs_R.tolist()
    for number in open_rows:
        rows[number].note(chosen[number], best[number], labels_RK[number] if labels_RK else None)
    return chosen


def _allowed_mask(matchers: list[LLMatcher], open_rows: set[int], vocabulary: int) -> torch.Tensor:
    """Return the mask [R, V] of the tokens that may follow; rows that have ended allow all."""
    packed = np.full((len(matchers), (vocabulary + 31) // 32 * 4), 255, dtype=np.uint8)
    for number in open_rows:
        bits = np.frombuffer(matchers[number].compute_bitmask(), dtype=np.uint8)
        packed[number] = bits[: packed.shape[1]]
    return torch.from_numpy(np.unpackbits(packed, axis=1, count=vocabulary, bitorder="little").astype(bool))


class _Row:
    """The tokens that one row has so far."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self._logprobs: list[float] = []
        self._labels: list[list[float] | None] = []

    def note(self, token: int, logprob: float, labels: list[float] | None) -> None:
        self.ids.append(token)
        self._logprobs.append(logprob)
        self._labels.append(labels)

    def finish(self, grammars: Grammars, cut: bool) -> Output:
        if grammars.tokens.is_special_token(self.ids[-1]):  # the end of a text
            del self.ids[-1], self._logprobs[-1], self._labels[-1]
        pieces = [grammars.tokens.decode_bytes([token]).decode(errors="replace") for token in self.ids]
        text = grammars.tokens.decode_bytes(self.ids).decode(errors="replace")
        at = next((n for n in reversed(range(len(pieces))) if any(sign in "0123456789" for sign in pieces[n])), None)
        if at is None or grammars.labels is None or self.ids[at] not in grammars.labels:
            return Output(self.ids, pieces, text, self._logprobs, None, None, cut)
        labels = self._labels[at]
        return Output(self.ids, pieces, text, self._logprobs, at, None if labels is None else tuple(labels), cut)
