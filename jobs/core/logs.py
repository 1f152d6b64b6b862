"""What jobs say of their work goes to standard error through `logging`, one logger per room; results are printed.

A terminal gets rich's lines above the progress bars, anything else plain lines or, if asked for, JSON.
"""

import argparse
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.highlighter import NullHighlighter
from rich.logging import RichHandler
from tqdm import tqdm

ROOTS = ("actors", "cluster", "jobs")
FLAGS = {
    "quiet": "say nothing but warnings and errors; no progress",
    "verbose": "say more (debug)",
    "log_json": "say it as JSON, an object a line: time, level, logger, message",
}


class _Terminal(RichHandler):
    """Lines with time and level; an error is a bare sentence, as it was before there was a log."""

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=sys.stderr):
            if record.levelno >= logging.ERROR:
                self.console.print(record.getMessage(), style="red", markup=False, highlight=False, soft_wrap=True)
            else:
                super().emit(record)


class _Plain(logging.Formatter):
    """`13:05:29 message`, the level where it is a warning; an error is a bare sentence."""

    def format(self, record: logging.LogRecord) -> str:
        if record.levelno >= logging.ERROR:
            return record.getMessage()
        level = " WARNING" if record.levelno == logging.WARNING else ""
        return f"{datetime.fromtimestamp(record.created):%H:%M:%S}{level} {record.getMessage()}"


class _Json(logging.Formatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        return json.dumps(fields, ensure_ascii=False)


class _Stderr(logging.StreamHandler):
    """Writes to what sys.stderr is at that moment."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self):  # type: ignore[override]
        """The stream to write to."""
        return sys.stderr


def configure(quiet: bool = False, verbose: bool = False, log_json: bool = False) -> None:
    """Send what the rooms say to standard error from now on; `quiet` wins over `verbose`."""
    handler: logging.Handler
    if sys.stderr.isatty() and not log_json:
        handler = _Terminal(
            console=Console(stderr=True), show_path=False, log_time_format="%H:%M:%S", highlighter=NullHighlighter()
        )
    else:
        handler = _Stderr()
        handler.setFormatter(_Json() if log_json else _Plain())
    level = logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO
    for name in ROOTS:
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


@contextmanager
def into_file(path: Path) -> Iterator[None]:
    """Append what the rooms say in the block, and what is printed, to a file; nothing else hears of it."""
    with open(path, "a") as file, redirect_stdout(file), redirect_stderr(file):
        before = {name: list(logging.getLogger(name).handlers) for name in ROOTS}
        configure()
        try:
            yield
        finally:
            for name, handlers in before.items():
                logging.getLogger(name).handlers = handlers


def parse_and_configure(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse this process's arguments, with FLAGS among them, and configure accordingly: for jobs without a Config."""
    for name, words in FLAGS.items():
        parser.add_argument(f"--{name}", action="store_true", help=words)
    options = parser.parse_args()
    configure(**{name: getattr(options, name) for name in FLAGS})
    return options


def split_flags(arguments: list[str]) -> tuple[dict[str, bool], list[str]]:
    """Return the flags of FLAGS that the arguments hold, and the other arguments."""
    given = {word: word[2:].replace("-", "_") for word in arguments if word.startswith("--")}
    flags = {name for name in given.values() if name in FLAGS}
    return dict.fromkeys(flags, True), [word for word in arguments if given.get(word) not in flags]
