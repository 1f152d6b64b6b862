"""Turns the errors that libraries raise at a user's files into one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LONGEST = 200  # characters of a library's message


@contextmanager
def reading(file: str | Path, what: str, remedy: str) -> Iterator[None]:
    """Turn what the block raises into a ValueError that names the file, the reason and the remedy.

    what: what failed ("": reading the file). Put only calls of libraries into the block: our own errors are clearer.
    MemoryError passes: it is not the file's fault.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        begin = f"{str(file)!r}: {what}" if what else f"{str(file)!r} cannot be read"
        raise ValueError(f"{begin} ({describe_error(error)}): {remedy}.") from error


def describe_error(error: BaseException) -> str:
    """Return an error's message on one line, at most LONGEST characters; with its class if that helps."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    words = " ".join(str(error).split())
    words = words if len(words) <= LONGEST else words[:LONGEST].rsplit(" ", 1)[0] + " ..."
    plain = isinstance(error, ValueError | OSError | RuntimeError) and words
    return words if plain else f"{type(error).__name__}: {words}" if words else type(error).__name__
