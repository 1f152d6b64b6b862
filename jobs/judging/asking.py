"""Verdicts on many answers: each different answer is judged once, a bounded number at a time.

Scored verdicts are kept in run_dir/verdicts as they come, for all models and jobs of the run folder; the next job
retries failures.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from weakref import WeakKeyDictionary

from actors.judge.cache import JudgeIdentity, may_be_cached, verdict_key
from actors.judge.calls import Failure, JudgeCall, Reply, Request
from actors.judge.ladder import judge
from actors.judge.verdict import Verdict
from cluster.tables import PartTable
from jobs.core.progress import Progress
from jobs.core.run import Run
from jobs.core.signals import run_async
from jobs.judging.rows import VerdictColumns

LOG = logging.getLogger("jobs.judging")

T = TypeVar("T")
Text = tuple[str, str, str]  # question, reference, candidate

FOLDER = "verdicts"
SAVE_EVERY, SAVE_EVERY_S = 500, 5.0  # verdicts, seconds: what a killed job loses at most
GIVE_UP = 100  # failures in a row after which the judge is not asked any more
BAD_OUTPUT = "bad_output"
_identities: WeakKeyDictionary[Run, JudgeIdentity] = WeakKeyDictionary()  # an entry ends with its run
PROBE = ("What is the name of this disease?", "This is psoriasis.", "This is psoriasis.")


@dataclass(frozen=True)
class KeyedVerdict:
    """A verdict under its key; `failure` is why there is no label: a kind of Failure, or BAD_OUTPUT (None: scored)."""

    key: str
    verdict: Verdict
    failure: str | None = None


class VerdictStore:
    """The scored verdicts of a run folder."""

    def __init__(self, folder: Path):
        self._parts = PartTable(folder)
        self._unsaved: list[VerdictColumns] = []
        self._saved_at = time.monotonic()
        self.scored = {row["judge_key"]: _from_row(row) for row in self._parts.all_rows()}

    def add(self, judged: KeyedVerdict) -> None:
        """Keep a verdict if it is scored; it is written to disk now and then, and by `save`."""
        if not may_be_cached(judged.verdict):
            return
        self.scored[judged.key] = judged
        self._unsaved.append(judge_columns(judged))
        if len(self._unsaved) >= SAVE_EVERY or time.monotonic() - self._saved_at >= SAVE_EVERY_S:
            self.save()

    def save(self) -> None:
        """Write the verdicts added since the last time."""
        if self._unsaved:
            self._parts.add(uuid.uuid4().hex, self._unsaved)
        self._unsaved, self._saved_at = [], time.monotonic()


def verdicts(run: Run, texts: Iterable[Text]) -> tuple[dict[Text, KeyedVerdict], JudgeIdentity]:
    """Return a verdict for every text, and the judge's identity; the judge is started only if one is missing.

    ValueError: the judge refuses the first call (key, model, URL). RuntimeError: it cannot be reached at all.
    """
    identity = identity_of(run)
    keys = {text: verdict_key(identity, *text, 0) for text in dict.fromkeys(texts)}
    store = VerdictStore(run.folder / FOLDER)
    missing = {key: text for text, key in keys.items() if key not in store.scored}
    LOG.info(f"judge: {len(keys)} different answers, {len(keys) - len(missing)} of them judged before")
    failed: dict[str, KeyedVerdict] = {}
    if missing:
        try:
            failed = run_async(_session(run, missing, store))
        except ExceptionGroup as errors:  # of a group of tasks: the user sees the first
            raise errors.exceptions[0] from errors
    return {text: store.scored.get(key) or failed[key] for text, key in keys.items()}, identity


def identity_of(run: Run) -> JudgeIdentity:
    """Return what names the run's judge; nothing is started. Its tokenizer is read once per run."""
    from jobs.judging.engine import judge_identity

    if run not in _identities:
        _identities[run] = judge_identity(run)
    return _identities[run]


def check_judge(run: Run) -> None:
    """ValueError: the run's judge cannot start, as far as that shows without starting it."""
    from jobs.judging.engine import check

    check(run)


async def _session(run: Run, missing: Mapping[str, Text], store: VerdictStore) -> dict[str, KeyedVerdict]:
    from jobs.judging.engine import judge_engine

    async with judge_engine(run) as (ask, _):
        await probe(ask, run.config.judge.url or run.config.judge.model)
        return await ask_all(ask, missing, store, run.config.judge.concurrency)


async def probe(ask: JudgeCall, name: str) -> None:
    """Judge one fixed answer, so that a judge that cannot answer at all ends the job at once."""
    first = await judge_one(ask, "", PROBE)
    if first.failure in ("refused", "denied"):
        raise ValueError(
            f"The judge {name} refuses ({first.verdict.reason}): check judge.model, judge.url and the key that "
            "judge.key_variable names."
        )
    if first.failure not in (None, BAD_OUTPUT):
        raise RuntimeError(f"The judge {name} does not answer ({first.verdict.reason}). Nothing was judged.")


async def ask_all(
    ask: JudgeCall, missing: Mapping[str, Text], store: VerdictStore, concurrency: int
) -> dict[str, KeyedVerdict]:
    """Judge every text, `concurrency` at a time; scored verdicts go to the store, the others are returned.

    A task that waits before it asks again keeps its place, so an endpoint that limits its rate gets fewer calls.
    A text that is refused (too long) neither adds to the failures in a row nor ends them.
    """
    waiting = iter(missing.items())
    failed: dict[str, KeyedVerdict] = {}
    in_a_row: list[KeyedVerdict] = []

    async def work(progress: Progress) -> None:
        for key, text in waiting:
            if len(in_a_row) >= GIVE_UP:
                judged = _skip_call(key, in_a_row[GIVE_UP - 1])
            else:
                judged = await judge_one(ask, key, text)
                if judged.failure in (None, BAD_OUTPUT):
                    in_a_row.clear()
                elif judged.failure != "refused":
                    in_a_row.append(judged)
            if judged.failure:
                failed[key] = judged
            store.add(judged)
            progress.step(f"{len(failed)} unscored" if failed else "")

    try:
        with Progress("judge", len(missing)) as progress:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(concurrency, len(missing))):
                    group.create_task(work(progress))
    finally:
        store.save()
    return failed


async def judge_one(ask: JudgeCall, key: str, text: Text) -> KeyedVerdict:
    """Judge one text, with retries (actors.judge.ladder)."""
    last: Reply | Failure | None = None

    async def ask_and_keep(request: Request) -> Reply | Failure:
        nonlocal last
        last = await ask(request)
        return last

    verdict = await judge(ask_and_keep, *text)
    if verdict.scored:
        return KeyedVerdict(key, verdict)
    return KeyedVerdict(key, verdict, last.kind if isinstance(last, Failure) else BAD_OUTPUT)


def _skip_call(key: str, last: KeyedVerdict) -> KeyedVerdict:
    reason = f"not asked: the judge failed {GIVE_UP} times in a row, at last {last.verdict.reason}"
    return KeyedVerdict(key, Verdict(None, reason, None, None, (), 0), last.failure)


def judge_columns(judged: KeyedVerdict) -> VerdictColumns:
    """Return a verdict as the columns of a table of answers."""
    verdict = judged.verdict
    return {
        "judge_label": verdict.label,
        "judge_reason": verdict.reason,
        "judge_expected": verdict.expected,
        "judge_label_mass": verdict.label_mass,
        "judge_raw": list(verdict.raw),
        "judge_tries": verdict.tries,
        "judge_key": judged.key,
    }


def _from_row(row: dict) -> KeyedVerdict:
    names = ("label", "reason", "expected", "label_mass", "raw", "tries")
    values = {name: row[f"judge_{name}"] for name in names}
    return KeyedVerdict(row["judge_key"], Verdict(**{**values, "raw": tuple(values["raw"])}))
