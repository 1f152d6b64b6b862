"""A pool of actors that loses no work when one of its processes dies.

Ray's own retries are at least once and can hang when a node is lost; here the driver owns them: one item
in flight per actor, a dead actor's item goes back to the queue and a new actor takes its place, and an
item that fails `ATTEMPTS` times is returned with its reason while the rest completes.
"""

import importlib
import os
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from cluster.connection import protect

protect()
import ray  # noqa: E402
from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, RayTaskError  # noqa: E402

ATTEMPTS = 3
# What a dead actor's call raises: Ray has a class of its own for an actor that its memory monitor killed, and one
# for a large result that was lost with its node.
DEATHS = (RayActorError, OutOfMemoryError, ObjectLostError)


@dataclass(frozen=True)
class Resources:
    """What one actor holds while it lives: cores, GPUs (a fraction shares one); and how many actors."""

    cpus: float = 1
    gpus: float = 0
    count: int = 1


@dataclass(frozen=True)
class Outcome:
    """One item's end: its value, or the reason why it failed after `attempts` tries."""

    key: Any
    value: Any = None
    error: str | None = None
    attempts: int = 1


@dataclass(frozen=True)
class _Work:
    key: Any
    args: tuple
    attempt: int = 1


class _Host:
    """The Ray edge of a plain class: builds it inside the actor's process and forwards calls."""

    def __init__(self, target: str, kwargs: dict, gpus: float):
        self._target, self._kwargs = target, kwargs
        if not gpus:  # Ray leaves a machine's GPUs visible to actors that asked for none
            os.environ["CUDA_VISIBLE_DEVICES"] = ""

    def setup(self) -> None:
        module, _, name = self._target.partition(":")
        self._object = getattr(importlib.import_module(module), name)(**self._kwargs)

    def call(self, method: str, args: tuple) -> Any:
        return getattr(self._object, method)(*args)

    def stream(self, method: str, args: tuple) -> Iterator:
        for item in getattr(self._object, method)(*args):  # noqa: UP028 (Ray sends values into this generator)
            yield item


class Pool:
    """`resources.count` actors of the class `target` ("package.module:Class"), each built with `kwargs`.

    Actors start when there is work for them. An exception in the class's constructor is raised to the caller;
    actors that die (out of memory, killed) are replaced, at most `respawns` times over the pool's life.
    """

    def __init__(self, target: str, kwargs: dict, resources: Resources, respawns: int = 16):
        self._target, self._kwargs, self._resources = target, kwargs, resources
        self._respawns_left = respawns
        self._idle: list = []
        self._flights: dict[Any, tuple] = {}  # object ref -> (actor, its work, or None while it sets up)

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *exception) -> None:
        for actor in [*self._idle, *(actor for actor, _ in self._flights.values())]:
            ray.kill(actor)
        self._idle.clear()
        self._flights.clear()

    def map(self, method: str, items: Iterable[tuple[Any, tuple]]) -> Iterator[Outcome]:
        """Call `method(*args)` for every (key, args) on whichever actor is free; yield outcomes as they come."""
        waiting = deque(_Work(key, args) for key, args in items)
        working = 0
        while waiting or working:
            while self._idle and waiting:
                actor, work = self._idle.pop(), waiting.popleft()
                self._flights[actor.call.remote(method, work.args)] = (actor, work)
                working += 1
            starting = len(self._flights) - working
            for _ in range(min(self._resources.count - len(self._flights), len(waiting) - starting)):
                self._spawn()
            actor, work, value, error = self._next()
            if work is None:
                continue
            working -= 1
            if error is None:
                yield Outcome(work.key, value=value, attempts=work.attempt)
            elif work.attempt < ATTEMPTS:
                waiting.append(_Work(work.key, work.args, work.attempt + 1))
            else:
                yield Outcome(work.key, error=error, attempts=work.attempt)

    def call(self, method: str, *args) -> Any:
        """Call `method(*args)` on one actor; what it raises is raised here."""
        (result,) = self._results_of("call", method, args)
        return result

    def stream(self, method: str, *args) -> Iterator:
        """Call the generator `method(*args)` on one actor and yield its items as they come."""
        return self._results_of("stream", method, args)

    def _results_of(self, edge: str, method: str, args: tuple) -> Iterator:
        """Yield the results of one call ("call": exactly one; "stream": a generator's) on a ready actor."""
        while not self._idle:
            if not self._flights:
                self._spawn()
            self._next()
        actor = self._idle.pop()
        try:
            if edge == "call":
                yield ray.get(actor.call.remote(method, args))
            else:
                for ref in actor.stream.options(num_returns="streaming").remote(method, args):
                    yield ray.get(ref)
        except RayTaskError as error:
            raise unwrapped(error) from error
        except DEATHS as error:
            ray.kill(actor)
            actor = None
            raise RuntimeError(f"The worker running {self._target}.{method} died ({_one_line(error)}).") from None
        finally:
            if actor is not None:
                self._idle.append(actor)

    def _spawn(self) -> None:
        options = {"num_cpus": self._resources.cpus, "num_gpus": self._resources.gpus}
        actor = ray.remote(max_restarts=0, max_task_retries=0, **options)(_Host).remote(
            self._target, self._kwargs, self._resources.gpus
        )
        self._flights[actor.setup.remote()] = (actor, None)

    def _next(self) -> tuple:
        """Wait for one flight to end; return (actor, work, value, reason of failure)."""
        (done,), _ = ray.wait(list(self._flights), num_returns=1)
        actor, work = self._flights.pop(done)
        try:
            value = ray.get(done)
        except RayTaskError as error:
            if work is None:
                ray.kill(actor)  # alive without an object; it would hold its GPU as long as this exception is kept
                raise unwrapped(error) from error
            self._idle.append(actor)
            return actor, work, None, _one_line(unwrapped(error))
        except DEATHS as error:
            ray.kill(actor)  # perhaps it was only out of reach
            if self._respawns_left <= 0:
                raise RuntimeError(
                    f"Workers of {self._target} keep dying; the last one said: {_one_line(error)}. "
                    "If they run out of memory, lower replicas.count or replicas.max_rows."
                ) from None
            self._respawns_left -= 1
            return actor, work, None, f"its worker died ({_one_line(error)})"
        self._idle.append(actor)
        return actor, work, value, None


def unwrapped(error: RayTaskError) -> BaseException:
    """Return the exception that the worker raised; raise it from `error`, which has the worker's traceback."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
