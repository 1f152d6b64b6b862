"""The loop over answers: each asked once, a bounded number at a time, kept as it comes, failures never scored."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from actors.judge.calls import Failure
from actors.judge.openai import OpenAIJudge
from cluster.tables import PartTable
from jobs.judging import asking as module
from jobs.judging.asking import GIVE_UP, PROBE, VerdictStore, ask_all, judge_one, probe, verdicts
from tests.jobs.judging import Mock, run_in, texts
from tests.openai_server import WHOLE, Server, completion, http

ROOT = Path(__file__).resolve().parents[2]


def test_each_different_answer_is_asked_once_and_a_second_run_asks_nothing(tmp_path, monkeypatch):
    mock = Mock().install(monkeypatch)
    asked = texts(50) * 3
    found, identity = verdicts(run_in(tmp_path), asked)
    assert identity.revision == "mock@1" and len(found) == 50
    assert all(one.verdict.label == 2 and one.verdict.expected is not None for one in found.values())
    assert sorted(mock.asked) == sorted([PROBE, *texts(50)])
    again, _ = verdicts(run_in(tmp_path), texts(50))
    assert again == found and len(mock.asked) == 51 and mock.sessions == 1
    more, _ = verdicts(run_in(tmp_path), texts(52))
    assert len(more) == 52 and len(mock.asked) == 51 + 1 + 2 and mock.sessions == 2
    stored = PartTable(tmp_path / "verdicts").all_rows()
    assert len(stored) == len({row["judge_key"] for row in stored}) == 52
    assert stored[0]["judge_raw"] == ['{"reason": "because", "label": 2}']


def test_another_judge_has_verdicts_of_its_own(tmp_path, monkeypatch):
    from dataclasses import replace

    from tests.jobs.judging import IDENTITY

    verdicts(run_in(tmp_path), texts(3)) if Mock().install(monkeypatch) else None
    other = Mock(lambda *_: 0).install(monkeypatch, replace(IDENTITY, dtype="bfloat16"))
    found, _ = verdicts(run_in(tmp_path), texts(3))
    assert {one.verdict.label for one in found.values()} == {0} and len(other.asked) == 4


def collected(tmp_path, mock: Mock, count: int, concurrency: int = 8) -> dict:
    missing = {str(n): text for n, text in enumerate(texts(count))}
    return asyncio.run(ask_all(mock.ask, missing, VerdictStore(tmp_path), concurrency))


def test_concurrency_is_bounded_and_used(tmp_path):
    mock = Mock(delay=0.005)
    assert collected(tmp_path, mock, 60, 7) == {} and mock.most == 7


def test_failures_are_unscored_with_their_kind_and_not_kept(tmp_path, monkeypatch, hurried):
    """Every fifth never answers, every seventh is refused, one is always bad output: no score, nothing kept."""

    def before(question, reference, candidate):
        number = int(candidate.split()[1][:-1])
        if number % 7 == 0:
            return Failure("refused", "too long")
        return Failure("closed", "gone") if number % 5 == 0 else None

    mock = Mock(lambda q, r, c: 9 if c == "Maybe 1." else 3, before)
    failed = collected(tmp_path, mock, 20)
    assert {key: one.failure for key, one in failed.items()} == {
        **dict.fromkeys(["0", "7", "14"], "refused"),
        **dict.fromkeys(["5", "10", "15"], "closed"),
        "1": "bad_output",
    }
    assert all(one.verdict.label is None and one.verdict.reason for one in failed.values())
    assert failed["5"].verdict.tries == 5 and failed["7"].verdict.tries == 1 and failed["1"].verdict.tries == 3
    assert len(VerdictStore(tmp_path).scored) == 13


def test_a_judge_that_is_gone_is_given_up(tmp_path, hurried):
    """After 100 failures in a row the others are UNSCORED without a call, and say so."""
    mock = Mock(before=lambda *_: Failure("closed", "gone"))
    failed = collected(tmp_path, mock, 400)
    assert len(failed) == 400 and len(mock.asked) <= 5 * (GIVE_UP + 8)
    reason = "not asked: the judge failed 100 times in a row, at last closed at try 5: gone"
    assert failed["399"].verdict.reason == failed["300"].verdict.reason == reason and failed["399"].failure == "closed"


def test_answers_that_are_refused_for_their_own_sake_do_not_end_the_judging(tmp_path):
    """110 that are too long, one after the other, and then 50 that are not; an endpoint that knows no key ends it."""

    def before(question, reference, candidate):
        return Failure("refused", "too long") if int(candidate.split()[1][:-1]) < 110 else None

    failed = collected(tmp_path, Mock(before=before), 160)
    assert len(failed) == 110 and {one.verdict.reason for one in failed.values()} == {"refused at try 1: too long"}
    assert len(VerdictStore(tmp_path).scored) == 50
    mock = Mock(before=lambda *_: Failure("denied", "HTTP 401: no such key"))
    assert len(collected(tmp_path / "b", mock, 160)) == 160 and GIVE_UP <= len(mock.asked) <= GIVE_UP + 8


def test_a_judge_that_comes_back_loses_nothing(tmp_path, hurried):
    """Every call fails once, as when a replica is replaced."""
    seen: set = set()

    def before(*text):
        new = text not in seen
        seen.add(text)
        return Failure("closed", "replica died") if new else None

    assert collected(tmp_path, Mock(before=before), 150) == {}
    assert len(VerdictStore(tmp_path).scored) == 150


@pytest.mark.parametrize(
    ("failure", "error", "says"),
    [
        (Failure("denied", "HTTP 401: no such key"), ValueError, "HTTP 401: no such key"),
        (Failure("refused", "more than 100 tokens"), ValueError, "more than 100 tokens"),
        (Failure("closed", "nobody listens"), RuntimeError, "Qwen2.5-32B-Instruct does not .* nobody listens"),
    ],
)
def test_what_no_answer_would_survive_ends_the_job_at_once(tmp_path, monkeypatch, hurried, failure, error, says):
    mock = Mock(before=lambda *_: failure).install(monkeypatch)
    with pytest.raises(error, match=says):
        verdicts(run_in(tmp_path), texts(700))
    assert len(mock.asked) <= 5 and set(mock.asked) == {PROBE}


def test_a_fault_of_an_engine_is_told_as_it_is(tmp_path, monkeypatch):
    def before(question, reference, candidate):
        if (question, reference, candidate) != PROBE:
            raise RuntimeError("a fault of the engine")

    Mock(before=before).install(monkeypatch)
    with pytest.raises(RuntimeError, match="a fault of the engine"):
        verdicts(run_in(tmp_path), texts(5))


def test_verdicts_reach_the_disk_before_the_end(tmp_path, monkeypatch):
    """A driver that is killed loses little: parts are written now and then."""
    monkeypatch.setattr(module, "SAVE_EVERY", 10)
    seen = []

    def before(*_):
        seen.append(len(list(tmp_path.glob("*.parquet"))))

    collected(tmp_path, Mock(before=before), 45)
    assert max(seen) >= 3 and len(list(tmp_path.glob("*.parquet"))) == 5
    monkeypatch.setattr(module, "SAVE_EVERY_S", 0.0)
    collected(tmp_path / "b", Mock(), 3)
    assert len(list((tmp_path / "b").glob("*.parquet"))) == 3


INTERRUPTED = """
import sys, asyncio
from jobs.core import command
from jobs.judging.asking import verdicts
from tests.jobs.judging import Mock
from tests.jobs.judging import texts
import pytest

mock = Mock(delay=0.05).install(pytest.MonkeyPatch())

def job(run):
    verdicts(run, texts(5000))

sys.argv = ["judge", "--run_dir", sys.argv[1], "--judge.engine", "transformers"]
command.main("doc", job)
"""


@pytest.mark.parametrize(
    ("number", "script"),
    [
        (signal.SIGINT, INTERRUPTED),
        pytest.param(signal.SIGTERM, INTERRUPTED, marks=pytest.mark.slow),
        (signal.SIGTERM, f"import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n{INTERRUPTED}"),
    ],
)
def test_interrupted_jobs_keep_what_came(tmp_path, number, script):
    """Ctrl-C and `ray job stop`, the latter of a script's background job, too: exit 130, one sentence, the verdicts."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, env=environment, **pipes)
    assert process.stderr is not None
    assert "5000 different answers, 0 of them" in process.stderr.readline()
    time.sleep(1.0)
    process.send_signal(number)
    try:
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in said and "what was finished is kept" in said
    assert len(VerdictStore(tmp_path / "verdicts").scored) >= 64


def test_end_to_end_against_a_server_that_misbehaves(tmp_path, monkeypatch, hurried):
    """Slowly, half, twice, 429, 500, hanging up, no JSON, no schema: nine verdicts, none of them another answer's."""
    label_only = http(completion('{"label": 1}'))
    bad = [http(completion("I would say 4")), http(completion('{"score": 4}'))]
    script = [
        WHOLE,  # the probe
        http(b"", "429 Too Many Requests", "Retry-After: 0\r\n"),
        http(b"", "500 Internal Server Error"),
        b"",
        WHOLE[:-20],
        WHOLE + WHOLE,
        [WHOLE[:40], 2.0],
        [0.05, WHOLE],
        *bad,
        label_only,
        *[WHOLE] * 6,
    ]

    async def session():
        async with Server(*script) as server, OpenAIJudge(server.url, "m", None, 0.5, False) as engine:
            store = VerdictStore(tmp_path)
            await probe(engine.ask, "it")
            missing = {str(n): text for n, text in enumerate(texts(9))}
            failed = await ask_all(engine.ask, missing, store, 1)
            return failed, store.scored, server

    failed, known, server = asyncio.run(session())
    assert failed == {} and sorted(known) == [str(n) for n in range(9)]
    assert sorted(one.verdict.label for one in known.values()) == [1, *[3] * 8]
    assert [known[str(n)].verdict.tries for n in range(4)] == [5, 2, 3, 1]
    asked = [json.loads(body["messages"][1]["content"].splitlines()[2].partition(": ")[2]) for _, body in server.heard]
    assert set(asked) == {PROBE[2], *(text[2] for text in texts(9))}


def test_an_endpoint_that_is_not_there(hurried):
    async def session():
        async with OpenAIJudge("http://127.0.0.1:9/v1", "m", None, 5.0, False) as engine:
            return await judge_one(engine.ask, "k", PROBE)

    judged = asyncio.run(session())
    assert judged.failure == "closed" and judged.verdict.tries == 5 and judged.verdict.label is None
