"""A private Ray head with a job server, for one machine: loopback only, token-protected, gone when its block ends."""

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster.connection import private_environment, private_folder

READY_WITHIN_S = 120
STOP_WITHIN_S = 20
RAY = Path(sys.executable).with_name("ray")


@dataclass(frozen=True)
class Head:
    """A private head's addresses (address: job server; gcs: for RAY_ADDRESS), and the environment with its token."""

    address: str
    gcs: str
    environment: dict[str, str]


@contextmanager
def private_head(cpus: int | None = None) -> Iterator[Head]:
    """Start `ray start --head` as a child process and yield it; stop it however the block ends.

    RuntimeError, with the last lines of its log, if it is not ready within two minutes.
    """
    folder = private_folder()
    gcs, dashboard, client = free_ports(3)
    environment = {
        **os.environ,
        **private_environment(),
        "RAY_TMPDIR": str(folder),
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "OMP_WAIT_POLICY": "passive",
    }
    environment.pop("RAY_ADDRESS", None)
    command = [
        *(str(RAY), "start", "--head", "--block", "--disable-usage-stats"),
        *("--node-ip-address", "127.0.0.1", "--port", str(gcs), "--ray-client-server-port", str(client)),
        *("--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard), "--dashboard-agent-listen-port=0"),
        *("--temp-dir", str(folder), "--num-cpus", str(cpus or os.cpu_count() or 1)),
    ]
    log = folder / "head.log"
    with open(log, "w") as output:
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
    head = Head(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{gcs}", environment)
    try:
        _wait_until_ready(process, head, log)
        yield head
    finally:
        _stop(process)
        shutil.rmtree(folder, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """Return ports that are free now; none is in 10002-19999, the range of Ray's workers."""
    sockets: list[socket.socket] = []
    ports: list[int] = []
    try:
        while len(ports) < count:
            sockets.append(socket.socket())
            sockets[-1].bind(("127.0.0.1", 0))
            port = sockets[-1].getsockname()[1]
            if not 10002 <= port <= 19999:
                ports.append(port)
    finally:
        for sock in sockets:
            sock.close()
    return ports


def _wait_until_ready(process: subprocess.Popen, head: Head, log: Path) -> None:
    request = urllib.request.Request(
        f"{head.address}/api/jobs/", headers={"Authorization": f"Bearer {head.environment['RAY_AUTH_TOKEN']}"}
    )
    deadline = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                if answer.status == 200 and "Ray runtime started" in log.read_text():
                    return
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.3)
    raise RuntimeError(f"The private Ray head did not start: {' | '.join(log.read_text().splitlines()[-5:])}")


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _stop(process: subprocess.Popen) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            pass
    try:
        os.killpg(process.pid, signal.SIGKILL)  # whatever is left of its session
    except ProcessLookupError:
        pass
    process.wait()
