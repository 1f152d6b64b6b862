"""Progress in a terminal (a bar) and in a log (a line now and then): counts, rate, time left."""

import io
import sys

import pytest
import tqdm.std

import jobs.core.progress
from jobs.core.progress import Progress


class Clock:
    """Time that passes when a test says so (s)."""

    def __init__(self):
        self.now = 1000.0

    def time(self) -> float:
        return self.now

    monotonic = time


class Stream(io.StringIO):
    """A stream that is a terminal, or is none."""

    def __init__(self, terminal: bool):
        super().__init__()
        self.isatty = lambda: terminal


def messages(log: Stream) -> list[str]:
    """The lines of a log, without their times."""
    return [line.split(" ", 1)[1] for line in log.getvalue().splitlines()]


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(jobs.core.progress, "time", made)
    monkeypatch.setattr(tqdm.std, "time", made.time)
    return made


def test_a_terminal_has_a_bar(clock, monkeypatch, capsys):
    """One of six was done before; two in four seconds leave three, for six seconds. Standard output stays empty."""
    terminal = Stream(True)
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress("ablate", 6, done=1) as progress:
        for note in ("first", "second"):
            clock.now += 2
            progress.step(note)
        shown = terminal.getvalue().split("\r")[-1]
        assert shown.startswith("ablate:  50%|") and "| 3/6 [00:04<00:06,  2.00s/it, second]" in shown
        clock.now += 6
        progress.at(6, "last")
    assert "ablate: 100%|" in terminal.getvalue() and "| 6/6 [00:10<00:00," in terminal.getvalue()
    assert terminal.getvalue().endswith("\n") and capsys.readouterr() == ("", "")


def test_a_log_has_a_line_now_and_then(clock, monkeypatch, capsys):
    """At most one in five seconds. Two were done before, so three in six seconds leave five, for ten seconds."""
    log = Stream(False)
    monkeypatch.setattr(sys, "stderr", log)
    with Progress("recover", 10, done=2) as progress:
        for seconds, done in ((4.9, 3), (1.1, 5), (4.9, 6), (0.1, 7)):
            clock.now += seconds
            progress.at(done, f"loss {done}")
        assert messages(log) == [
            "recover: 5/10 (0.5/s, 10 s left) loss 5",
            "recover: 7/10 (0.45/s, 7 s left) loss 7",
        ]
        clock.now += 4
        progress.step(count=3)
    assert messages(log)[2:] == ["recover: 10/10 done in 15 s"] and capsys.readouterr().out == ""


def test_before_anything_is_done_no_time_left_is_told(clock, monkeypatch, capsys):
    """And what a failure interrupts is not said to be done."""
    log = Stream(False)
    monkeypatch.setattr(sys, "stderr", log)
    with pytest.raises(InterruptedError), Progress("recover", 10, done=2) as progress:
        clock.now += 5
        progress.at(2)
        raise InterruptedError
    assert messages(log) == ["recover: 2/10 (0/s)"] and capsys.readouterr().out == ""
