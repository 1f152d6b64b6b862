"""Connecting to Ray: the cluster at RAY_ADDRESS, or a private one on this machine that ends with the job."""

import logging
import math
import os
import secrets
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from cluster import lost

LOG = logging.getLogger("cluster")
JOIN_WAIT_S = 60.0
REPOSITORY = Path(__file__).resolve().parent.parent
_LOOPBACK_ONLY = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_USAGE_STATS_REPORT_URL": "http://127.0.0.1:9/",
    "AUTOSCALER_METRIC_PORT": "0",
    "DASHBOARD_METRIC_PORT": "0",
    # Without a GPU Ray warns at every start that a future version will leave this variable alone.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def private_environment() -> dict[str, str]:
    """Return the environment of a private Ray: loopback only, token-protected, no telemetry."""
    token = os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32)
    return {**_LOOPBACK_ONLY, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}


def protect() -> None:
    """Set a private Ray's environment in this process, unless RAY_ADDRESS names a cluster.

    Ray reads its security settings once, when it is imported: whatever imports ray calls this before.
    """
    if is_private() and "ray" not in sys.modules:
        os.environ.update(private_environment())


@contextmanager
def connect(cpus: int | None = None) -> Iterator[None]:
    """Connect this process to Ray while the block runs; a process that is connected already (a worker) stays so.

    With RAY_ADDRESS set (as in every submitted job) that cluster is used and left running. Otherwise a
    private Ray with `cpus` cores (default: all) starts on loopback, in its own temporary folder, and is
    stopped when the block ends, however it ends. ConnectionError names an address that does not answer. If the
    cluster is lost during the block, the process ends with a message.
    """
    address = _address()
    private = is_private()
    protect()
    import ray

    if ray.is_initialized():
        yield
        return
    folder = watched = None
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    try:
        if not private:
            _check_reachable(address)
            with _joining(address):
                ray.init(address=address, runtime_env=_own_code(), **quiet)
            LOG.debug(f"ray: connected to {address}")
        else:
            folder = private_folder()
            ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                _node_ip_address="127.0.0.1",
                _temp_dir=str(folder),
                **quiet,
            )
            LOG.debug(f"ray: a private Ray on this machine, its logs are in {folder}")
        watched = lost.watch(address)
        yield
    finally:
        if watched:
            watched.look()
            if watched.missing is None:  # a private Ray ends with the block: that is no loss
                watched.stop()
        ray.shutdown()  # would wait for a head that is lost
        if watched:
            watched.stop()
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _joining(address: str) -> Iterator[None]:
    """End the process with a message if the block, which joins a cluster, takes longer than JOIN_WAIT_S.

    Ray itself tries for minutes where a cluster refuses a token, and says little.
    """
    timer = threading.Timer(JOIN_WAIT_S, _give_up, (address,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _give_up(address: str) -> None:
    from ray._private.services import find_gcs_addresses

    local = ", ".join(sorted(find_gcs_addresses())) if address == "auto" else ""
    LOG.error(
        f"{Path(sys.argv[0]).stem}: No Ray cluster accepted this job at RAY_ADDRESS={address!r} within "
        f"{JOIN_WAIT_S:g} s{f' (found on this machine: {local})' if local else ''}: it may be somebody else's, with "
        "another RAY_AUTH_TOKEN, or still starting. Give HOST:PORT of yours (and its token), or unset RAY_ADDRESS to "
        "use this machine alone."
    )
    os._exit(1)


def private_folder() -> Path:
    """Make a folder for a private Ray, with a short path (sockets' paths are limited); remove those of dead drivers."""
    for leftover in Path("/tmp").glob("prn-*-*"):
        number = leftover.name.split("-")[1]
        if number.isdigit() and not psutil.pid_exists(int(number)):
            shutil.rmtree(leftover, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"prn-{os.getpid()}-", dir="/tmp"))


def _address() -> str:
    return os.environ.get("RAY_ADDRESS", "").strip()


def _own_code() -> dict | None:
    """Ship this repository with a job started by hand; a submitted job brought its own working folder."""
    if in_submitted_job():
        return None
    return {"working_dir": str(REPOSITORY)}


def is_private() -> bool:
    """Tell whether `connect` starts a private Ray here, which never grows."""
    return _address() in ("", "local")


def in_submitted_job() -> bool:
    """Tell whether this process is the entrypoint of `ray job submit`."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def _check_reachable(address: str) -> None:
    if address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        raise ConnectionError(
            f"No Ray cluster answers at RAY_ADDRESS={address!r} ({error}). Start one there, correct the address "
            "(HOST:PORT of the head, usually port 6379), or unset RAY_ADDRESS to use this machine alone."
        ) from None


def largest_node() -> float:
    """Return the cores of the node that has most."""
    import ray

    return max((node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]), default=0.0)


def capacity() -> tuple[float, float]:
    """Return the (cores, GPUs) of the connected cluster."""
    import ray

    resources = ray.cluster_resources()
    return resources.get("CPU", 0.0), resources.get("GPU", 0.0)


def room(cpus: float, gpus: float) -> int:
    """Return how many actors of `cpus` cores and `gpus` GPUs the present nodes could hold if they were free."""
    return sum(_rooms(cpus, gpus))


def room_on_one(cpus: float, gpus: float) -> int:
    """Return the largest number of such actors that a single node could hold."""
    return max(_rooms(cpus, gpus), default=0)


def _rooms(cpus: float, gpus: float) -> list[int]:
    import ray

    return [_room_on(node["Resources"], cpus, gpus) for node in ray.nodes() if node["Alive"]]


def _room_on(node: dict[str, float], cpus: float, gpus: float) -> int:
    available = node.get("GPU", 0.0)
    whole = gpus >= 1 or not gpus
    by_gpus = _times(available, gpus) if whole else int(available) * _times(1, gpus)  # a fraction is of one GPU
    return int(min(_times(node.get("CPU", 0.0), cpus), by_gpus))


def _times(available: float, wanted: float) -> float:
    return math.floor(available / wanted + 1e-9) if wanted else math.inf
