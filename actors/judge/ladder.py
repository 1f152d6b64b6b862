"""When the judge is asked again: a pure function of the replies and failures so far, and the loop that follows it.

Bad output: one longer try, then one for the label alone, then UNSCORED. Transport: each of these calls is tried
up to five times, with waits that double, by kind of failure. Failures that would recur are not retried.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from pydantic import BaseModel

from actors.judge.calls import Failure, JudgeCall, Reply, Request
from actors.judge.prompt import SYSTEM, Judgement, LabelOnly, schema_of, user_message
from actors.judge.verdict import Verdict, expected_score, read_output

TRIES = 5
FIRST_WAIT = {"rate_limit": 4.0, "server_error": 2.0, "timeout": 1.0, "closed": 1.0}  # seconds; the others: no retry
LONGEST_RETRY_AFTER = 120.0  # seconds; a server that asks for more is not waited for


@dataclass(frozen=True)
class Rung:
    """One way to ask: the output's kind, the closing line, and the longest output (tokens)."""

    output: type[BaseModel]
    closing: str
    max_tokens: int


RUNGS = (
    Rung(Judgement, "reasoned", 256),
    Rung(Judgement, "reasoned", 1024),
    Rung(LabelOnly, "label_only", 24),
)


@dataclass(frozen=True)
class Ask:
    """The next call: which rung, after how many seconds."""

    rung: Rung
    wait: float


def next_step(history: Sequence[Reply | Failure], jitter: float) -> Ask | Verdict:
    """Return the next call, or the verdict, after all replies and failures so far.

    jitter: in [0, 1], spreads the waits of many callers. Called with a verdict's raw outputs as replies, it parses them
    again.
    """
    replies = [item for item in history if isinstance(item, Reply)]
    if history and isinstance(history[-1], Failure):
        return _after_failure(history, history[-1], replies, jitter)
    if replies:
        try:
            return _read_verdict(history, replies)
        except ValueError as error:
            if len(replies) == len(RUNGS):
                return _unscored(history, replies, f"bad output {len(RUNGS)} times, at last: {error}")
    return Ask(RUNGS[len(replies)], 0.0)


def _after_failure(
    history: Sequence[Reply | Failure], failure: Failure, replies: list[Reply], jitter: float
) -> Ask | Verdict:
    failed = 0
    while failed < len(history) and isinstance(history[-1 - failed], Failure):
        failed += 1
    retry_after = failure.retry_after or 0.0
    if failure.kind not in FIRST_WAIT or failed >= TRIES or retry_after > LONGEST_RETRY_AFTER:
        return _unscored(history, replies, f"{failure.kind} at try {failed}: {failure.message}")
    backoff = FIRST_WAIT[failure.kind] * 2 ** (failed - 1) * (0.5 + 0.5 * jitter)
    return Ask(RUNGS[len(replies)], retry_after + backoff)


def _read_verdict(history: Sequence[Reply | Failure], replies: list[Reply]) -> Verdict:
    output = read_output(replies[-1].text, RUNGS[len(replies) - 1].output).model_dump()
    expected, mass = None, None
    if replies[-1].probabilities is not None:
        expected, mass = expected_score(replies[-1].probabilities)
        mass = None if replies[-1].masked else mass
    raw = tuple(reply.text for reply in replies)
    return Verdict(output["label"], output.get("reason", ""), expected, mass, raw, len(history))


def _unscored(history: Sequence[Reply | Failure], replies: list[Reply], reason: str) -> Verdict:
    return Verdict(None, reason, None, None, tuple(reply.text for reply in replies), len(history))


def request(question: str, reference: str, candidate: str, rung: Rung) -> Request:
    """Return the call of one rung."""
    user = user_message(question, reference, candidate, rung.closing)
    return Request(SYSTEM, user, schema_of(rung.output), rung.max_tokens)


async def judge(
    ask: JudgeCall,
    question: str,
    reference: str,
    candidate: str,
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
) -> Verdict:
    """Ask until there is a verdict, scored or UNSCORED."""
    history: list[Reply | Failure] = []
    while isinstance(step := next_step(history, random.random()), Ask):
        if step.wait:
            await sleep(step.wait)
        history.append(await ask(request(question, reference, candidate, step.rung)))
    return step
