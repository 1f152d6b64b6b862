"""Compares what llama.cpp answers with an export with what transformers answers."""

from collections.abc import Mapping, Sequence

FIRST = 5  # most likely first tokens whose log-probabilities are compared
TOLERANCE = {"F16": 0.1, "Q8_0": 1.0}  # nats, by type of the weights; types of fewer bits only get a similarity


def compare(reference: Sequence[Mapping], answers: Sequence[Mapping]) -> dict:
    """Return how far llama.cpp's answers are from transformers', over all questions.

    first_token_nats: the largest difference of the log-probabilities of the FIRST most likely first tokens, None where
    llama.cpp gave none (its first token was a part of a character); same_answers: the share of answers with the same
    tokens; same_tokens: the mean share of an answer's tokens before the first that differs; gap_nats: how much less
    likely, to transformers, llama.cpp's token is where they part, at most; prompts: whether all prompts have the same
    number of tokens.
    """
    pairs = list(zip(reference, answers, strict=True))
    prefixes = [_common(ours["ids"], theirs["ids"]) for ours, theirs in pairs]
    lengths = [len(ours["ids"]) for ours, _ in pairs]
    return {
        "questions": len(pairs),
        "prompts": all(ours["prompt_tokens"] == theirs["prompt_tokens"] for ours, theirs in pairs),
        "first_token_nats": max((_first_token(*pair) for pair in pairs if pair[1]["first"]), default=None),
        "same_answers": sum(ours["ids"] == theirs["ids"] for ours, theirs in pairs) / len(pairs),
        "same_tokens": sum(same / length for same, length in zip(prefixes, lengths, strict=True)) / len(pairs),
        "gap_nats": max(_gap(ours, theirs, same) for (ours, theirs), same in zip(pairs, prefixes, strict=True)),
    }


def _common(ours: Sequence[int], theirs: Sequence[int]) -> int:
    return next(
        (i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), min(len(ours), len(theirs))
    )


def _first_token(ours: Mapping, theirs: Mapping) -> float:
    found = {int(token): value for token, value in theirs["first"].items()}
    floor = min(found.values())  # of a token that is not among them: the difference is at least this
    likely = sorted(ours["steps"][0].items(), key=lambda item: -item[1])[:FIRST]
    return max(abs(found.get(int(token), floor) - value) for token, value in likely)


def _gap(ours: Mapping, theirs: Mapping, same: int) -> float:
    if same >= len(ours["ids"]) or same >= len(theirs["ids"]):
        return 0.0  # one ends where the other goes on only at a token that ends it
    step = ours["steps"][same]
    return step[ours["ids"][same]] - step.get(theirs["ids"][same], min(step.values()))


def refusal(type_name: str, found: Mapping) -> str | None:
    """Say what is wrong with an export; None: it passes. found: of `compare`."""
    if not found["prompts"]:
        return "llama.cpp makes other tokens of a prompt than transformers: tokenizer or chat template do not fit"
    if (limit := TOLERANCE.get(type_name)) is None:
        return None
    if found["first_token_nats"] is not None and found["first_token_nats"] > limit:
        return (
            f"the log-probabilities of the first token are up to {found['first_token_nats']:.2g} nats from "
            f"transformers' (allowed: {limit:g})"
        )
    if found["gap_nats"] > 2 * limit:
        return (
            f"llama.cpp goes on with a token that is {found['gap_nats']:.2g} nats less likely to transformers than its "
            f"own (allowed: {2 * limit:g})"
        )
    return None
