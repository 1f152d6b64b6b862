"""Progress of long work: a bar in a terminal, a line now and then in a job's log."""

import logging
import time

from tqdm import tqdm

from jobs.core.logs import shows_bars

LOG = logging.getLogger("jobs.core")

LOG_EVERY_S = 5.0


class Progress:
    """Counts units of work: `with Progress("ablate", total) as p: p.step(note="...")`."""

    def __init__(self, label: str, total: int, done: int = 0):
        self._label, self._total, self._done, self._first = label, total, done, done
        self._started = self._printed = time.monotonic()
        self._bar = tqdm(total=total, initial=done, desc=label) if shows_bars() else None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind, *_) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None:
            took = time.monotonic() - self._started
            self._log(f"{self._label}: {self._done}/{self._total} done in {took:.0f} s")

    def step(self, note: str = "", count: int = 1) -> None:
        """Say that `count` more units are finished."""
        self.at(self._done + count, note)

    def at(self, done: int, note: str = "") -> None:
        """Say that `done` units in all are finished."""
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(done - self._done)
        self._done = done
        now = time.monotonic()
        if self._bar is None and now - self._printed >= LOG_EVERY_S:
            self._printed = now
            rate = (done - self._first) / (now - self._started)
            left = f", {(self._total - done) / rate:.0f} s left" if rate else ""
            self._log(f"{self._label}: {done}/{self._total} ({rate:.2g}/s{left}) {note}".rstrip())

    def _log(self, message: str) -> None:
        LOG.info(message, extra={"done": self._done, "total": self._total})
