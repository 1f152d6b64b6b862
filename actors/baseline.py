"""The embedded baseline: a transparent score of an answer against its reference. It is not an LLM judge.

If the reference names the disease, an answer that names no class, several, or the wrong one scores 0. Otherwise
the score is the mean of token F1 and embedding similarity, so a verbatim answer scores 1.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

_NEGATION = re.compile(
    r"\b(?:not(?! only| just)|no(?! doubt)|never|neither|nor|without|unlikely|rather than|instead of|excludes?"
    r"|rule[sd]? out|(?:is|are|was|were|do|does|did)n't|(?:cannot|can't|couldn't) be)\b|\bnon[ -]$"
)
_DENIED = re.compile(r" (?:is|was|seems|appears|can be|has been) (?:\w+ )?(?:unlikely(?! to)|excluded|ruled out)\b")
_CLAUSE = re.compile(r"[.;,:!?\u2013\u2014]|\b(?:but|however|although|though|whereas)\b")
# An answer that names no class and holds one of these is a refusal. ("I am sorry, melanoma" names a class.)
REFUSALS = (
    *("cannot", "can not", "can't", "could not", "couldn't", "unable to", "not able to", "impossible to"),
    *("sorry", "as an ai", "do not know", "don't know", "not sure", "decline to", "refuse to"),
)
_REFUSAL = re.compile(r"\b(?:" + "|".join(map(re.escape, REFUSALS)) + r")\b")
_WORD = re.compile(r"[a-z0-9]+")


@dataclass(frozen=True)
class ClassName:
    """One class with all spellings that count as it."""

    name: str
    synonyms: tuple[str, ...] = ()


def words(text: str) -> list[str]:
    """Return the lower-case words of a text."""
    return _WORD.findall(text.lower())


def _plain(text: str) -> str:
    """Return a text in lower case, on one line, with straight apostrophes."""
    return " ".join(text.lower().replace("\u2019", "'").split())


def named_classes(text: str, classes: Sequence[ClassName]) -> list[str]:
    """Return the classes that a text affirms, in the order of `classes`.

    A mention after a negation in the same clause ("not psoriasis", "rather than melanoma") or before one ("melanoma is
    unlikely") does not count; "but" begins a clause. Plurals count.
    """
    text = _plain(text)
    affirmed = set()
    spellings = [(spelling, kind.name) for kind in classes for spelling in (kind.name, *kind.synonyms)]
    for spelling, name in sorted(spellings, key=lambda pair: -len(pair[0])):
        for match in re.finditer(_spelling_pattern(spelling), text):
            clause = _CLAUSE.split(text[: match.start()])[-1]
            if not _NEGATION.search(clause) and not _DENIED.match(text, match.end()):
                affirmed.add(name)
            # "seborrheic dermatitis" must not also count as dermatitis
            text = text[: match.start()] + "_" * len(match[0]) + text[match.end() :]
    return [kind.name for kind in classes if kind.name in affirmed]


def _spelling_pattern(spelling: str) -> str:
    stem = spelling.lower()
    for plural, singular in (("keratoses", "keratosis"), ("carcinomas", "carcinoma"), ("melanomas", "melanoma")):
        stem = stem.replace(plural, singular)
    pattern = r"[\s-]+".join(map(re.escape, stem.split()))
    return r"\b" + pattern.replace("keratosis", "keratos[ie]s") + r"s?\b"


def token_f1(answer: str, reference: str) -> float:
    """Return the F1 of the answer's words against the reference's, as multisets, in [0, 1]."""
    answer_words, reference_words = Counter(words(answer)), Counter(words(reference))
    common = sum((answer_words & reference_words).values())
    if common == 0:
        return 0.0
    precision, recall = common / sum(answer_words.values()), common / sum(reference_words.values())
    return 2 * precision * recall / (precision + recall)


def name_given(answer: str, classes: Sequence[ClassName]) -> tuple[str | None, str]:
    """Return the one class that an answer names and "one", or None and "none", "multiple" or "refused" (no class, and
    one of the words in REFUSALS)."""
    named = named_classes(answer, classes)
    if len(named) == 1:
        return named[0], "one"
    if named:
        return None, "multiple"
    return None, "refused" if _REFUSAL.search(_plain(answer)) else "none"


def name_verdict(answer: str, truth: str, classes: Sequence[ClassName]) -> str:
    """Return "right" or "wrong" for an answer that names one class, else the second value of `name_given`."""
    name, kind = name_given(answer, classes)
    if name is None:
        return kind
    return "right" if name == truth else "wrong"


def baseline_score(answer: str, reference: str, truth: str, similarity: float, classes: Sequence[ClassName]) -> float:
    """Score an answer in [0, 1]: the mean of token F1 and embedding similarity (negative similarities count as 0).

    0 if the reference names `truth` and the answer does not name it alone, or if the reference does not name it and the
    answer names another class. 1 if both have the same words.
    """
    if words(answer) == words(reference):
        return 1.0
    if truth in named_classes(reference, classes):
        if name_verdict(answer, truth, classes) != "right":
            return 0.0
    elif any(name != truth for name in named_classes(answer, classes)):
        return 0.0
    return (token_f1(answer, reference) + max(0.0, similarity)) / 2
