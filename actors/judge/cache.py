"""The cache key of a verdict: the hash of everything that decides it, and of nothing else."""

import hashlib
import json
from dataclasses import dataclass

from actors.judge.calls import Request
from actors.judge.ladder import RUNGS, request
from actors.judge.prompt import RUBRIC_VERSION
from actors.judge.verdict import Verdict


@dataclass(frozen=True)
class JudgeIdentity:
    """What identifies a judge; with any other value the verdicts are new ones.

    revision: model and commit; tokenizer: its commit or hash; chat_template: its text or hash, and whether the
    system's text is folded into the user's turn; engine: name and version; dtype: of the weights; sampling: its
    settings ("greedy", or temperature, top-p and seed).
    """

    revision: str
    tokenizer: str
    chat_template: str
    engine: str
    dtype: str
    sampling: str


def verdict_key(judge: JudgeIdentity, question: str, reference: str, candidate: str, replicate: int) -> str:
    """Return the SHA-256 (hex) of the judge, the rubric, every call that the ladder may make, and the texts.

    The calls hold prompt and schema as the judge sees them. Row numbers and the candidate's model are not in the key,
    so equal answers share a verdict. replicate: number of the repetition, 0 for the first.
    """
    calls: list[Request] = [request(question, reference, candidate, rung) for rung in RUNGS]
    parts = {
        "judge": vars(judge),
        "rubric": RUBRIC_VERSION,
        "calls": [vars(call) for call in calls],
        "texts": [question, reference, candidate],
        "replicate": replicate,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def may_be_cached(verdict: Verdict) -> bool:
    """Tell whether other runs may use a verdict; unscored answers are judged again."""
    return verdict.scored
