"""What libraries raise while they read somebody's files, as one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LONGEST = 200  # letters of a library's own words


@contextmanager
def reading(file: str | Path, what: str, remedy: str) -> Iterator[None]:
    """Turn what the block raises into a ValueError that names the file, the reason and the remedy.

    what: what the block was to do, "" for reading the file. Put only calls of libraries into the block: our own errors
    say more. Memory that is short is no fault of the file, and passes.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        begin = f"{str(file)!r}: {what}" if what else f"{str(file)!r} cannot be read"
        raise ValueError(f"{begin} ({say(error)}): {remedy}.") from error


def say(error: BaseException) -> str:
    """Return an error's first words on one line; its class where the words alone say little."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    words = " ".join(str(error).split())
    words = words if len(words) <= LONGEST else words[:LONGEST].rsplit(" ", 1)[0] + " ..."
    plain = isinstance(error, ValueError | OSError | RuntimeError) and words
    return words if plain else f"{type(error).__name__}: {words}" if words else type(error).__name__
