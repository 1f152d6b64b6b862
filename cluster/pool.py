"""A pool of actors that loses no work when one of its processes dies.

Ray's own retries are at least once and can hang when a node is lost; here the driver owns them: one item
in flight per actor, a dead actor's item goes back to the queue and a new actor takes its place, and an
item that fails `ATTEMPTS` times is returned with its reason while the rest completes.
"""

import importlib
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

ATTEMPTS = 3


@dataclass(frozen=True)
class Resources:
    """What one actor holds while it lives: cores, GPUs (a fraction shares one), and its count."""

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


class _Host:
    """The Ray edge of a plain class: builds it inside the actor's process and forwards calls."""

    def __init__(self, target: str, kwargs: dict):
        self._target, self._kwargs = target, kwargs

    def setup(self) -> None:
        module, _, name = self._target.partition(":")
        self._object = getattr(importlib.import_module(module), name)(**self._kwargs)

    def call(self, method: str, args: tuple) -> Any:
        return getattr(self._object, method)(*args)

    def stream(self, method: str, args: tuple) -> Iterator:
        yield from getattr(self._object, method)(*args)


class Pool:
    """`resources.count` actors of the class `target` ("package.module:Class"), each built with `kwargs`.

    An exception in the class's constructor is raised to the caller; actors that die (out of memory, killed)
    are replaced, at most `respawns` times over the pool's life.
    """

    def __init__(self, target: str, kwargs: dict, resources: Resources, respawns: int = 16):
        self._target, self._kwargs, self._resources = target, kwargs, resources
        self._respawns_left = respawns
        self._actors = []

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *exception) -> None:
        for actor in self._actors:
            ray.kill(actor)
        self._actors.clear()

    def map(self, method: str, items: Iterable[tuple[Any, tuple]]) -> Iterator[Outcome]:
        """Call `method(*args)` for every (key, args) on whichever actor is free; yield outcomes as they come."""
        waiting = deque((key, args, 1) for key, args in items)
        flights: dict[Any, tuple] = {}  # object ref -> (actor, work item or None while it sets up)
        while waiting or any(work for _, work in flights.values()):
            wanted = min(self._resources.count, len(waiting) + sum(1 for _, w in flights.values() if w))
            while len(self._actors) < wanted:
                actor, ready = self._spawn()
                flights[ready] = (actor, None)
            (done,), _ = ray.wait(list(flights), num_returns=1)
            actor, work = flights.pop(done)
            try:
                value = ray.get(done)
            except RayActorError as error:
                self._replace(actor, error)
                if work:
                    yield from self._retry(waiting, work, f"its worker died ({_one_line(error)})")
                continue
            except RayTaskError as error:
                if work is None:
                    raise unwrapped(error) from None
                yield from self._retry(waiting, work, _one_line(unwrapped(error)))
            else:
                if work:
                    yield Outcome(work[0], value=value, attempts=work[2])
            if waiting:
                work = waiting.popleft()
                flights[actor.call.remote(method, work[1])] = (actor, work)

    def stream(self, method: str, *args) -> Iterator:
        """Call the generator `method(*args)` on one actor and yield its items as they come."""
        actor, ready = self._spawn()
        try:
            ray.get(ready)
            for ref in actor.stream.options(num_returns="streaming").remote(method, args):
                yield ray.get(ref)
        except RayTaskError as error:
            raise unwrapped(error) from None
        except RayActorError as error:
            raise RuntimeError(f"The worker running {self._target}.{method} died: {_one_line(error)}") from None

    def _spawn(self) -> tuple:
        remote = ray.remote(
            num_cpus=self._resources.cpus, num_gpus=self._resources.gpus, max_restarts=0, max_task_retries=0
        )(_Host)
        actor = remote.remote(self._target, self._kwargs)
        self._actors.append(actor)
        return actor, actor.setup.remote()

    def _replace(self, actor, error: Exception) -> None:
        self._actors.remove(actor)
        if self._respawns_left <= 0:
            raise RuntimeError(
                f"Workers of {self._target} keep dying; the last one said: {_one_line(error)}. "
                "If it ran out of memory, lower replicas.count or the batch."
            ) from None
        self._respawns_left -= 1

    @staticmethod
    def _retry(waiting: deque, work: tuple, reason: str) -> Iterator[Outcome]:
        key, args, attempt = work
        if attempt >= ATTEMPTS:
            yield Outcome(key, error=reason, attempts=attempt)
        else:
            waiting.append((key, args, attempt + 1))


def unwrapped(error: RayTaskError) -> BaseException:
    """Return the exception that the worker raised, with the worker's traceback as its cause."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):
        cause.__cause__ = error
        return cause
    return error


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
