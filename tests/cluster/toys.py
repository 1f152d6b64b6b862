"""Plain classes for the pool's tests: each can do one thing that goes wrong on real machines."""

import hashlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cluster.pool import Pool, Resources

import ray  # isort: skip  (cluster.pool protects it first)


def die() -> None:
    """End this process as the kernel's out-of-memory killer does."""
    os.kill(os.getpid(), signal.SIGKILL)


def until(true: Callable[[], bool], what: str) -> None:
    """Wait for a minute at most."""
    deadline = time.monotonic() + 60
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.01)


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
        until(lambda: len(list(Path(folder).iterdir())) >= count, f"fewer than {count} came")
        return os.getpid()

    def stage(self, name: str, folder: str, meets: tuple[str, ...]) -> None:
        """Note the begin in NAME.began, wait until all files of `meets` exist, and note what `unit` returns in NAME."""
        began = Path(folder) / f"{name}.began"
        began.touch()
        until(lambda: all((Path(folder) / one).exists() for one in meets), f"{name} waits for {meets}")
        row = {**self.unit(0.2), "began": began.stat().st_mtime, "ended": time.time()}
        (Path(folder) / name).write_text(json.dumps(row))

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
        """Wait, and end well, in an error (`end`: its words), or by SIGKILL: once ("dies") or each time ("killed")."""
        path = self._folder / name
        if path.exists():
            return {"made": False, "pid": os.getpid(), "number": number}
        with open(self._folder / "tries", "a") as file:
            file.write(f"{name}\n")
        time.sleep(seconds)
        if end == "killed" or (end == "dies" and not (self._folder / f"{name}.died").exists()):
            (self._folder / f"{name}.died").touch()
            die()
        if end not in ("", "dies"):
            raise RuntimeError(end)
        path.touch()
        return {"made": True, "pid": os.getpid(), "number": number}


class Borrows:
    """Makes stages as jobs do: in a worker of its own that holds what the stage needs, and nothing else does."""

    def __init__(self, folder: str):
        self._folder = Path(folder)

    def make(self, name: str, gpus: float, meets: tuple[str, ...]) -> dict:
        """Ask for a core and so many GPUs; note that in NAME.asked."""
        (self._folder / f"{name}.asked").touch()
        with Pool("tests.cluster.toys:Meets", {}, Resources(1, gpus)) as pool:
            pool.call("stage", name, str(self._folder), meets)
        return {"made": True, "pid": os.getpid()}


class Ranks:
    """Counts with torch's process group, in which Ray Train puts it."""

    def __init__(self, offset: int):
        self._offset = offset

    def count(self, steps: int, bad_rank: int | None = None, end: str = "raise") -> Iterator[dict]:
        """Yield the ranks' sum at every step; `bad_rank` raises, or dies, after the first."""
        from torch import distributed, tensor

        rank = distributed.get_rank()
        for step in range(steps):
            if step and rank == bad_rank:
                if end == "die":
                    die()
                raise RuntimeError(f"rank {rank} cannot do step {step}")
            total = tensor([self._offset + rank])
            try:
                distributed.all_reduce(total)
            except RuntimeError as error:
                raise ConnectionError("another rank is gone") from error
            yield {"step": step, "rank": rank, "sum": int(total)}
