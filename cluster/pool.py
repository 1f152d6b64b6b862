"""A pool of actors that loses no work when a process or a node dies, and that grows with its cluster.

Ray's own retries may run a call twice, and can hang when a node is lost; here the driver retries. Each actor has
one item in flight; a dead actor's item goes to the end of the queue, and a new actor takes its place where there
is room. An item that fails `ATTEMPTS` times is returned with its reason while the rest completes.
"""

import importlib
import logging
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from cluster.connection import protect, room
from cluster.text import one_line

protect()
import ray  # noqa: E402
from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, RayTaskError  # noqa: E402

LOG = logging.getLogger("cluster")
ATTEMPTS = 3
LOOK_EVERY_S = 2.0  # for nodes that joined or left
# What a dead actor's call raises: Ray has a class of its own for an actor that its memory monitor killed, and one
# for a large result that was lost with its node.
DEATHS = (RayActorError, OutOfMemoryError, ObjectLostError)


class WorkerDied(RuntimeError):
    """The process died during a call: out of memory, by a signal, or with its node."""


@dataclass(frozen=True)
class Resources:
    """The cores and GPUs (a fraction shares one) that each actor holds while it lives, and the number of actors.

    count: "auto" is as many as the nodes can hold at the time, and at least one. With a number, actors that find no
    room wait in Ray's queue, where an autoscaling cluster sees them.
    """

    cpus: float = 1
    gpus: float = 0
    count: int | Literal["auto"] = 1


@dataclass(frozen=True)
class Outcome:
    """One item's result: its value, or the reason why it failed after `attempts` tries."""

    key: Any
    value: Any = None
    error: str | None = None
    attempts: int = 1


@dataclass(frozen=True)
class _Work:
    method: str
    key: Any
    args: tuple
    attempt: int = 1


class _Host:
    """The Ray actor of a plain class: builds the object in its own process and forwards calls."""

    def __init__(self, target: str, kwargs: dict, gpus: float):
        self._target, self._kwargs = target, kwargs
        if not gpus:  # Ray leaves a machine's GPUs visible to actors that asked for none
            os.environ["CUDA_VISIBLE_DEVICES"] = ""

    def setup(self) -> float:
        """Build the object; return the seconds that took."""
        started = time.monotonic()
        module, _, name = self._target.partition(":")
        self._object = getattr(importlib.import_module(module), name)(**self._kwargs)
        return time.monotonic() - started

    def call(self, method: str, args: tuple) -> Any:
        return getattr(self._object, method)(*args)

    def stream(self, method: str, args: tuple) -> Iterator:
        for item in getattr(self._object, method)(*args):  # noqa: UP028 (Ray sends values into this generator)
            yield item


class Pool:
    """`resources.count` actors of the class `target` ("package.module:Class"), each built with `kwargs`.

    Actors start when there is work for them. An exception in the class's constructor is raised to the caller;
    actors that die (out of memory, killed, lost with their node) are replaced. The pool gives up when the deaths since
    the last finished item reach `respawns` plus the most actors that it ever had at a time. Deaths at an item's second
    and third try do not count, so that a few items that kill their worker do not end the pool.
    """

    def __init__(self, target: str, kwargs: dict, resources: Resources, respawns: int = 16):
        self._target, self._kwargs, self._resources = target, kwargs, resources
        self._respawns, self._deaths, self._most = respawns, 0, 0
        self._room, self._look_at = 0, 0.0
        self._idle: list = []
        self._flights: dict[Any, tuple] = {}  # object ref -> (actor, its work, or None while it sets up)
        self._waiting: deque[_Work] = deque()
        self._ended: deque[Outcome] = deque()
        self._left = 0  # outcomes that the running map has yet to yield
        self._since: dict[Any, float] = {}  # actor -> when it got its place; before that it waits in Ray's queue
        self.gpu_seconds = 0.0  # GPUs times the seconds that actors held them; complete after the exit

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *exception) -> None:
        for actor in [*self._idle, *(actor for actor, _ in self._flights.values())]:
            ray.kill(actor)
        self._idle.clear()
        self._flights.clear()
        for actor in list(self._since):
            self._end_lease(actor)

    def map(self, method: str, items: Iterable[tuple[Any, tuple]]) -> Iterator[Outcome]:
        """Call `method(*args)` for every (key, args), in this order, on whichever actor is free.

        Outcomes are yielded as they come. The actors keep working while the caller handles one.
        """
        if self._left:
            raise RuntimeError("This pool's last map was not read to its end: read it, or use another pool.")
        self._waiting.extend(_Work(method, key, args) for key, args in items)
        self._left = len(self._waiting)
        while self._left:
            self._hand_out()
            if self._ended:
                self._left -= 1
                yield self._ended.popleft()
            else:
                self._wait()

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
            self._wait()
        actor = self._idle.pop()
        try:
            if edge == "call":
                yield ray.get(actor.call.remote(method, args))
            else:
                for ref in actor.stream.options(num_returns="streaming").remote(method, args):
                    yield ray.get(ref)
        except RayTaskError as error:
            raise unwrap(error) from error
        except DEATHS as error:
            ray.kill(actor)
            self._end_lease(actor)
            actor = None
            raise WorkerDied(f"The worker running {self._target}.{method} died ({one_line(error)}).") from None
        finally:
            if actor is not None:
                self._idle.append(actor)

    def _hand_out(self) -> None:
        """Give every idle actor an item, and start actors for the items that are left."""
        while self._idle and self._waiting:
            actor, work = self._idle.pop(), self._waiting.popleft()
            self._flights[actor.call.remote(work.method, work.args)] = (actor, work)
        if self._waiting:
            starting = sum(work is None for _, work in self._flights.values())
            for _ in range(min(self._wanted() - len(self._flights), len(self._waiting) - starting)):
                self._spawn()

    def _wanted(self) -> int:
        """Return how many actors there should be now."""
        if self._resources.count != "auto":
            return self._resources.count
        if time.monotonic() >= self._look_at:
            self._room = max(1, room(self._resources.cpus, self._resources.gpus))
            self._look_at = time.monotonic() + LOOK_EVERY_S
        return self._room

    def _spawn(self) -> None:
        options = {"num_cpus": self._resources.cpus, "num_gpus": self._resources.gpus}
        actor = ray.remote(max_restarts=0, max_task_retries=0, **options)(_Host).remote(
            self._target, self._kwargs, self._resources.gpus
        )
        self._flights[actor.setup.remote()] = (actor, None)
        self._most = max(self._most, len(self._flights) + len(self._idle))

    def _end_lease(self, actor) -> None:
        if actor in self._since:
            self.gpu_seconds += self._resources.gpus * (time.monotonic() - self._since.pop(actor))

    def _wait(self) -> None:
        """Wait until a flight ends, or until it is time to look at the cluster again."""
        done, _ = ray.wait(list(self._flights), num_returns=1, timeout=LOOK_EVERY_S)
        for ref in done:
            self._land(ref)

    def _land(self, ref) -> None:
        """Free the actor of a flight that ended; its item is done, waits for another try, or has failed."""
        actor, work = self._flights.pop(ref)
        value = reason = None
        try:
            value = ray.get(ref)
            if work is None:
                self._since[actor] = time.monotonic() - value
        except RayTaskError as error:
            if work is None:
                ray.kill(actor)  # it lives without an object, and would hold its GPU as long as this exception exists
                raise unwrap(error) from error
            reason = one_line(unwrap(error))
        except DEATHS as error:
            ray.kill(actor)  # it may only be unreachable
            self._end_lease(actor)
            actor, reason = None, f"its worker died ({one_line(error)})"
            self._deaths += work is None or work.attempt == 1
            if self._deaths >= self._most + self._respawns:
                raise RuntimeError(
                    f"Workers of {self._target} keep dying; the last one said: {one_line(error)}. "
                    "If they run out of memory, lower replicas.count or replicas.max_rows."
                ) from None
        if actor is not None:
            self._idle.append(actor)
        if work is None:
            return
        if reason is None:
            self._deaths = 0
        if reason is not None:
            LOG.debug(f"{self._target}: {work.key}: try {work.attempt} of {ATTEMPTS} failed: {reason}")
        if reason is not None and work.attempt < ATTEMPTS:
            self._waiting.append(replace(work, attempt=work.attempt + 1))
        else:
            self._ended.append(Outcome(work.key, value, reason, work.attempt))


def unwrap(error: RayTaskError) -> BaseException:
    """Return the exception that the worker raised; raise it from `error`, which has the worker's traceback."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error
