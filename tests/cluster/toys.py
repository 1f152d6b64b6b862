"""Plain classes for the pool's tests: each can do one thing that goes wrong on real machines."""

import hashlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import ray


def die() -> None:
    """End this process as the kernel's out-of-memory killer does."""
    os.kill(os.getpid(), signal.SIGKILL)


class Squares:
    """Works."""

    def __init__(self, offset: int = 0):
        self._offset = offset

    def square(self, number: int) -> int:
        return number * number + self._offset

    def process(self, _: int = 0) -> int:
        time.sleep(0.05)  # so that no actor can take all
        return os.getpid()


class Meets:
    """Waits for its colleagues; notes each that came in `folder`."""

    def meet(self, _: int, folder: str, count: int) -> int:
        (Path(folder) / str(os.getpid())).touch()
        deadline = time.monotonic() + 30
        while len(list(Path(folder).iterdir())) < count:
            if time.monotonic() > deadline:
                raise TimeoutError(f"fewer than {count} came")
            time.sleep(0.01)
        return os.getpid()

    def unit(self, seconds: float) -> dict:
        """Take some time; return where and when (seconds of this machine's clock)."""
        began = time.monotonic()
        time.sleep(seconds)
        return {
            "process": os.getpid(),
            "node": ray.get_runtime_context().get_node_id(),
            "devices": os.environ["CUDA_VISIBLE_DEVICES"],
            "began": began,
            "ended": time.monotonic(),
        }


class Digests:
    """Computes, slowly, what everybody can compute."""

    def digest(self, number: int) -> str:
        time.sleep(0.03)
        return hashlib.sha256(str(number).encode()).hexdigest()


class Mortal:
    """Dies at the items in `deadly`, on the first try only or on every try; notes each try in `folder`."""

    def __init__(self, folder: str, deadly: tuple[int, ...] = (), every_try: bool = False):
        self._folder, self._deadly, self._every_try = Path(folder), deadly, every_try

    def work(self, item: int) -> int:
        first = not (self._folder / f"{item}.1").exists()
        tries = len(list(self._folder.glob(f"{item}.*"))) + 1
        (self._folder / f"{item}.{tries}").touch()
        if item in self._deadly and (first or self._every_try):
            die()
        return item * 10

    def stream(self, count: int) -> Iterator[int]:
        yield from range(count)
        die()


class Stillborn:
    """Dies in its constructor; notes each birth in `folder`."""

    def __init__(self, folder: str):
        (Path(folder) / str(os.getpid())).touch()
        die()


class Refuses:
    """Cannot be built."""

    def __init__(self, path: str):
        raise ValueError(f"No checkpoint at {path!r}: give a folder.")


class Errs:
    """Raises, and lives on."""

    def __init__(self):
        self._tries: dict[int, int] = {}

    def work(self, item: int, good_from: int) -> int:
        self._tries[item] = self._tries.get(item, 0) + 1
        if self._tries[item] < good_from:
            raise ValueError(f"item {item} is odd\nand more")
        return item

    def process(self) -> int:
        return os.getpid()


class Streams:
    """A generator that goes on only when its consumer has seen the item before."""

    def steps(self, folder: str, count: int) -> Iterator[int]:
        for step in range(count):
            yield step
            seen, deadline = Path(folder) / str(step), time.monotonic() + 20
            while not seen.exists():
                if time.monotonic() > deadline:
                    raise TimeoutError(f"nobody saw step {step}")
                time.sleep(0.01)

    def fails(self, after: int) -> Iterator[int]:
        yield from range(after)
        raise ValueError("the batch does not fit")

    def process(self) -> int:
        return os.getpid()


class Stages:
    """Makes stages that are empty files; notes every try in `folder`/tries."""

    def __init__(self, folder: str):
        self._folder = Path(folder)

    def make(self, name: str, seconds: float, end: str, number: float) -> dict:
        """Wait, and end well, in an error (`end`: its words), or once by SIGKILL (`end`: "dies")."""
        path = self._folder / name
        if path.exists():
            return {"made": False, "pid": os.getpid(), "number": number}
        with open(self._folder / "tries", "a") as file:
            file.write(f"{name}\n")
        time.sleep(seconds)
        if end == "dies" and not (self._folder / f"{name}.died").exists():
            (self._folder / f"{name}.died").touch()
            die()
        if end not in ("", "dies"):
            raise RuntimeError(end)
        path.touch()
        return {"made": True, "pid": os.getpid(), "number": number}
