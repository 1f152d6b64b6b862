"""Runs a plain class as a Ray Serve application while a block runs: dead replicas are replaced, and calls time out.

An application is called through its handle, within the cluster; over HTTP only where a port is asked for, and then on
127.0.0.1 of the cluster's head. How many calls are in flight is the caller's business.
"""

import asyncio
import hashlib
import importlib
import importlib.util
import inspect
import logging
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.artifacts import digest, file_sha256
from cluster.connection import capacity, is_private, protect, room
from cluster.pool import DEATHS, unwrap
from cluster.serving.left_overs import end, end_left, own_name
from cluster.serving.start import QUIET, check_http, check_port, is_running, shut_down, start
from cluster.text import one_line

protect()
import ray  # noqa: E402
from ray import serve  # noqa: E402
from ray.exceptions import RayTaskError  # noqa: E402
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException  # noqa: E402

LOG = logging.getLogger("cluster.serving")

TRIES = 4  # of one call, if its replica dies
POLL_S = 0.2
HEALTH_PERIOD_S = 2.0  # how soon a dead replica is noticed
EXPLAIN_EVERY_S = 60.0  # log why an application is not up yet


class ServiceLost(RuntimeError):
    """A call without an answer: its replica died on every try, or the application is gone."""


@dataclass(frozen=True)
class Scale:
    """What one replica holds (cores, GPUs), how many there are, and how many calls each takes at a time.

    max_replicas: under load; equal to replicas: no autoscaling.
    """

    cpus: float
    gpus: float
    replicas: int
    max_replicas: int
    at_once: int

    def options(self) -> dict:
        """Return Serve's options for a deployment."""
        count: dict = {"num_replicas": self.replicas}
        if self.max_replicas > self.replicas:
            target = max(1, self.at_once // 2)
            limits = {"min_replicas": self.replicas, "max_replicas": self.max_replicas}
            count = {"autoscaling_config": {**limits, "target_ongoing_requests": target}}
        return {
            **count,
            "max_ongoing_requests": self.at_once,
            "max_constructor_retry_count": 2,
            "health_check_period_s": HEALTH_PERIOD_S,
            "graceful_shutdown_wait_loop_s": 0.2,
            "graceful_shutdown_timeout_s": 5.0,
            "logging_config": QUIET,
        }


class Service:
    """A running application."""

    def __init__(self, name: str, handle: Any):
        self.name, self.handle = name, handle

    async def call(self, method: str, *args: Any, timeout: float) -> Any:
        """Return `method(*args)` of a replica's object; what it raises is raised here.

        timeout: for all tries and waits together (s), else TimeoutError. If the replica dies the call is repeated;
        ServiceLost: it died TRIES times, or the application is gone.
        """
        return await send_with_retries(lambda: self.handle.call.remote(method, args), self.name, timeout)


async def send_with_retries(send: Callable[[], Awaitable], name: str, timeout: float) -> Any:
    """Await what `send()` returns, again if its replica dies; see Service.call."""
    async with asyncio.timeout(timeout):
        for number in range(1, TRIES + 1):
            try:
                return await send()
            except RayTaskError as error:
                raise unwrap(error) from error
            except DEATHS as error:
                if number == TRIES:
                    raise ServiceLost(f"{TRIES} replicas of {name} died over one call ({one_line(error)}).") from None
            except DeploymentUnavailableError:
                raise ServiceLost(f"{name} is gone: another job removed it, or it failed.") from None
            except RayServeException as error:
                if number == TRIES:
                    raise ServiceLost(f"{name} does not answer ({one_line(error)}).") from None
            await asyncio.sleep(POLL_S)


@asynccontextmanager
async def serve_class(
    label: str, target: str, kwargs: dict, scale: Scale, keep: bool = False, port: int | None = None
) -> AsyncIterator[Service]:
    """Host the class `target` ("package.module:Class"), built with `kwargs` in every replica.

    A method may be `async def`. With `port` a request to any path of 127.0.0.1:port goes to the object's
    `async def http(method, path, body) -> (status, JSON value)`. An object's `check_health()` that raises has its
    replica replaced. See `host_application` for the rest.
    """
    options = {"ray_actor_options": {"num_cpus": scale.cpus, "num_gpus": scale.gpus}, **scale.options()}
    application = serve.deployment(_Replica, name="replica", **options).bind(target, kwargs, scale.gpus)
    name = application_name(label, target, {"kwargs": kwargs, "scale": asdict(scale), "port": port})
    async with host_application(name, application, scale, keep, port) as service:
        yield service


@asynccontextmanager
async def host_application(
    name: str, application: Any, scale: Scale, keep: bool = False, port: int | None = None
) -> AsyncIterator[Service]:
    """Run a Serve application while the block lasts, and yield it when all its replicas are up.

    keep: it stays up under `name`; later blocks reuse it, and the first one without keep ends it. Without keep it has a
    unique name. ValueError: no room on a private Ray, a port that is taken or that Serve cannot offer, or the object's
    constructor refused its arguments; RuntimeError: it did not come up, with the reason.
    """
    for logger in ("ray.serve", "ray.serve._private.router"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    _check_room(scale)
    started_serve = not is_running()
    if started_serve:
        check_port(port)
    try:
        start(port)
        check_http(port)
        end_left()
        runs_already = _state(name) in ("RUNNING", "DEPLOYING")
        if not runs_already:
            if _state(name) is not None:
                serve.delete(name)  # an earlier block kept it, and it broke
            name = name if keep else own_name(name)
        try:
            if not runs_already:
                prefix = None if port is None else "/"
                serve.run_many([serve.RunTarget(application, name, prefix, QUIET)], wait_for_applications_running=False)
            await _wait_until_running(name)
            yield Service(name, serve.get_app_handle(name))
        finally:
            _leave(name, keep)
    finally:
        if started_serve and not is_private():
            shut_down()


def _leave(name: str, keep: bool) -> None:
    try:
        stays = keep and _state(name) in ("RUNNING", "UNHEALTHY")
    except Exception:  # the cluster is gone
        stays = False
    if not stays:
        end(name)
    elif is_private():
        LOG.info(f"serving: {name} is kept only as long as this Ray, which is private and ends with the job")
    else:
        LOG.info(f"serving: {name} stays up; the next job that uses it without keeping it ends it")


def application_name(label: str, target: str, recipe: dict) -> str:
    """Return a name that differs with label, target, recipe, and the code of the target's package and of this one."""
    package = importlib.util.find_spec(target.partition(":")[0].partition(".")[0])
    folders = [Path(__file__).parents[1], *map(Path, (package and package.submodule_search_locations) or ())]
    files = sorted(file for folder in folders for file in folder.rglob("*.py"))
    code = hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest()
    return f"{label}-{digest([target, recipe, code])}"


class _Replica:
    """The Serve deployment of a plain class."""

    def __init__(self, target: str, kwargs: dict, gpus: float):
        bind_to_node()
        if not gpus:  # Ray leaves a machine's GPUs visible to actors that asked for none
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        module, _, name = target.partition(":")
        self._object = getattr(importlib.import_module(module), name)(**kwargs)

    async def call(self, method: str, args: tuple) -> Any:
        function = getattr(self._object, method)
        if inspect.iscoroutinefunction(function):
            return await function(*args)
        return await asyncio.to_thread(function, *args)

    async def __call__(self, request: Any) -> Any:
        from starlette.responses import JSONResponse

        status, body = await self._object.http(request.method, request.url.path, await request.body())
        return JSONResponse(body, status_code=status)

    def check_health(self) -> None:
        check = getattr(self._object, "check_health", None)
        if check is not None:
            check()


def bind_to_node() -> None:
    """Bind this replica's gRPC server to its node's address; call it in a deployment's constructor.

    Serve opens one in every replica, on all interfaces, without authentication, and it unpickles what comes
    (ray.serve._private.replica, `_on_initialized`). On a private Ray the node's address is 127.0.0.1.
    """
    replica = sys.modules.get("ray.serve._private.replica")
    bind = getattr(replica, "add_port_to_grpc_server", None)
    if bind is None or hasattr(bind, "node"):
        return
    address = ray.util.get_node_ip_address()
    address = f"[{address}]" if ":" in address else address

    def on_node(server: Any, wanted: str) -> int:
        return bind(server, wanted.replace("[::]", address))

    on_node.node = address  # type: ignore[attr-defined]
    replica.add_port_to_grpc_server = on_node  # type: ignore[union-attr]


def _check_room(scale: Scale) -> None:
    fit = room(scale.cpus, scale.gpus)
    if fit >= scale.replicas:
        return
    total = "{:g} cores and {:g} GPUs".format(*capacity())
    text = f"{scale.replicas} replica(s) of {scale.cpus:g} cores and {scale.gpus:g} GPUs are wanted; there are {total}"
    if is_private():
        raise ValueError(f"{text}: ask for fewer or smaller ones, or add nodes.")
    LOG.warning(f"serving: {text}; waiting for nodes")


def _state(name: str) -> str | None:
    application = serve.status().applications.get(name)
    return application.status.value if application else None


async def _wait_until_running(name: str) -> None:
    """Wait until the application is up; RuntimeError (ValueError if its constructor raised one) with the reason."""
    started = explained = time.monotonic()
    while True:
        application = serve.status().applications.get(name)
        if application is None:
            raise RuntimeError(f"{name} was removed while it started.")
        messages = [deployment.message for deployment in application.deployments.values() if deployment.message]
        if application.status.value == "RUNNING":
            return
        if application.status.value in ("DEPLOY_FAILED", "UNHEALTHY"):
            kind, reason = _last_error("\n".join(messages) or application.message)
            raise (ValueError if kind.endswith("ValueError") else RuntimeError)(f"{name} did not come up: {reason}")
        if is_private() and any("to be scheduled" in message for message in messages):
            raise RuntimeError(f"There is no room for {name}: {messages[0]}")
        if time.monotonic() - explained >= EXPLAIN_EVERY_S:
            explained = time.monotonic()
            reason = messages[0] if messages else application.status.value
            LOG.warning(f"serving: {name} is not up after {explained - started:.0f} s: {reason}")
        await asyncio.sleep(POLL_S)


def _last_error(message: str) -> tuple[str, str]:
    """Return the class and the text of the exception at the end of a traceback in a status message."""
    lines = [line.rstrip() for line in message.splitlines() if line.strip()]
    starts = [n for n, line in enumerate(lines) if line[0].isalpha() and line.partition(":")[0].endswith("Error")]
    if not starts:
        return "", " ".join(lines)[-500:]
    kind, _, text = " ".join(lines[starts[-1] :]).partition(": ")
    return kind, f"{text or kind}"[:1000]
