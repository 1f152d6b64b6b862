"""Jobs log to standard error through `logging`, one logger per room; results are printed to standard output.

A terminal gets rich's lines above the progress bars, anything else plain lines or, if asked for, JSON.
"""

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.highlighter import NullHighlighter
from rich.logging import RichHandler
from rich.text import Text
from tqdm import tqdm

ROOTS = ("actors", "cluster", "jobs")
STANDARD = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}  # what every record has
FLAGS = {
    "quiet": "log only warnings and errors; no progress",
    "verbose": "log more (debug)",
    "log_json": "log as JSON, an object a line: time, level, logger, message, numbers",
}
_flags = dict.fromkeys(FLAGS, False)  # of this process


class _Terminal(RichHandler):
    """Lines with time and level, of any length: a path can be copied. An error is a bare sentence."""

    def render(self, *, record: logging.LogRecord, message_renderable, **_) -> Text:  # type: ignore[override]
        time = Text(f"{datetime.fromtimestamp(record.created):%H:%M:%S} ", "log.time")
        return Text.assemble(time, self.get_level_text(record), " ", message_renderable)

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=sys.stderr):
            if record.levelno >= logging.ERROR and not record.exc_info:
                self.console.print(record.getMessage(), style="red", markup=False, highlight=False)
            else:
                super().emit(record)


class _Plain(logging.Formatter):
    """`13:05:29 message`, the level where it is a warning; an error is a bare sentence."""

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.levelno < logging.ERROR:
            level = " WARNING" if record.levelno == logging.WARNING else ""
            text = f"{datetime.fromtimestamp(record.created):%H:%M:%S}{level} {text}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


class _Json(logging.Formatter):
    """One JSON object per line; what `extra` gave has keys of its own."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **{key: value for key, value in vars(record).items() if key not in STANDARD and key[0] != "_"},  # _: Ray's
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False, default=str)


class _Stderr(logging.StreamHandler):
    """Writes to the current sys.stderr."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self):  # type: ignore[override]
        """The stream to write to."""
        return sys.stderr


def configure(quiet: bool = False, verbose: bool = False, log_json: bool = False) -> None:
    """Send the rooms' logs to standard error from now on; `quiet` wins over `verbose`."""
    _flags.update(quiet=quiet, verbose=verbose, log_json=log_json)
    handler: logging.Handler
    if sys.stderr.isatty() and not log_json:
        handler = _Terminal(console=Console(stderr=True, soft_wrap=True), highlighter=NullHighlighter())
    else:
        handler = _Stderr()
        handler.setFormatter(_Json() if log_json else _Plain())
    level = logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO
    for name in ROOTS:
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


def current_flags() -> dict[str, bool]:
    """Return the flags that this process was configured with, for processes that work for it."""
    return dict(_flags)


def shows_bars() -> bool:
    """Tell whether progress is a bar here: on a terminal, unless lines are to be JSON or there is to be no progress."""
    return sys.stderr.isatty() and not _flags["log_json"] and not _flags["quiet"]


@contextmanager
def into_file(path: Path, flags: Mapping[str, bool]) -> Iterator[None]:
    """Send the logs and the printed output of the block to the end of a file, and nowhere else."""
    loggers = [logging.getLogger(name) for name in ROOTS]
    before = [(logger, logger.handlers, logger.propagate, logger.level) for logger in loggers]
    flags_before = current_flags()
    with open(path, "a") as file, redirect_stdout(file), redirect_stderr(file):
        configure(**flags)
        try:
            yield
        finally:
            _flags.update(flags_before)
            for logger, handlers, propagate, level in before:
                logger.handlers, logger.propagate = handlers, propagate
                logger.setLevel(level)


def parse_and_configure(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse this process's arguments, with FLAGS among them, and configure accordingly: for jobs without a Config."""
    for name, words in FLAGS.items():
        parser.add_argument(f"--{name}", action="store_true", help=words)
    options = parser.parse_args()
    configure(**{name: getattr(options, name) for name in FLAGS})
    return options


def split_flags(arguments: list[str]) -> tuple[dict[str, bool], list[str]]:
    """Return the flags of FLAGS that the arguments hold, and the other arguments."""
    names = {word: word[2:].replace("-", "_") for word in arguments if word.startswith("--")}
    flags = {name for name in names.values() if name in FLAGS}
    return dict.fromkeys(flags, True), [word for word in arguments if names.get(word) not in flags]
