"""Connecting: a private Ray is private and leaves nothing behind; a cluster that does not answer is named at once."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from cluster.connection import _check_reachable, capacity, connect, private_folder

REPOSITORY = Path(__file__).resolve().parents[2]
# A process that starts a private Ray and prints what it consists of: its folder, processes and listening sockets.
START = """
import json, os, signal, sys, time
{first}
from cluster.connection import connect
def describe():
    import psutil, ray
    folder = "/" + "/".join(ray._private.worker._global_node.get_session_dir_path().split("/")[1:3])
    processes = psutil.Process().children(recursive=True)
    listening = []
    for process in processes:
        try:
            listening += [c.laddr.ip for c in process.net_connections("inet") if c.status == "LISTEN"]
        except psutil.NoSuchProcess:
            pass
    ids = [[p.pid, p.create_time()] for p in processes if p.is_running()]
    text = json.dumps({{"folder": folder, "processes": ids, "listening": listening}})
    print(text, flush=True)
with connect(1):
    describe()
    {then}
"""


@dataclass(frozen=True)
class Started:
    """A private Ray in a process of its own."""

    process: subprocess.Popen
    folder: Path
    processes: list
    listening: list[str]


def start(then: str, first: str = "") -> Started:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    process = subprocess.Popen(
        [sys.executable, "-c", START.format(first=first, then=then)],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    line = process.stdout.readline()
    if not line:
        pytest.fail(process.communicate(timeout=30)[1])
    found = json.loads(line)
    return Started(process, Path(found["folder"]), found["processes"], found["listening"])


def parts_of(ray: Started) -> list[str]:
    """Return what there is of a private Ray: its folder, and processes by id or by the folder in their command line."""
    parts = [str(ray.folder)] if ray.folder.exists() else []
    for process in psutil.process_iter(["pid", "create_time", "cmdline", "status"]):
        info = process.info
        known = [info["pid"], info["create_time"]] in ray.processes and info["status"] != psutil.STATUS_ZOMBIE
        if known or any(str(ray.folder) in word for word in info["cmdline"] or []):
            parts.append(" ".join(info["cmdline"] or [str(info["pid"])]))
    return parts


def left_of(ray: Started, within_s: float = 5) -> list[str]:
    """Return what is still there of a private Ray some seconds after its end: processes need a moment to die."""
    deadline = time.monotonic() + within_s
    while parts_of(ray) and time.monotonic() < deadline:
        time.sleep(0.1)
    return parts_of(ray)


def test_a_private_ray_is_on_loopback_only_and_gone_after_an_exception():
    # Importing the pool first imports ray, which reads its security settings then: as every job does.
    ray = start("raise RuntimeError('the job failed')", first="import cluster.pool")
    _, errors = ray.process.communicate(timeout=60)
    assert ray.process.returncode == 1 and "RuntimeError: the job failed" in errors
    assert ray.folder.name.startswith("prn-") and len(ray.processes) >= 3
    assert len(ray.listening) >= 3
    assert {address.removeprefix("::ffff:") for address in ray.listening} == {"127.0.0.1"}
    assert left_of(ray) == []


def test_a_private_ray_is_gone_after_an_interrupt():
    ray = start("time.sleep(60)")
    assert ray.folder.exists()
    assert len(parts_of(ray)) > 3  # that it finds them while they live
    began = time.monotonic()
    ray.process.send_signal(signal.SIGINT)
    _, errors = ray.process.communicate(timeout=60)
    assert time.monotonic() - began < 30 and "KeyboardInterrupt" in errors
    assert left_of(ray) == []


def closed_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def test_a_cluster_that_does_not_answer_is_named_at_once():
    address = f"127.0.0.1:{closed_port()}"
    script = (
        "import sys, time\nfrom cluster.connection import connect\nimport ray\nbegan = time.monotonic()\ntry:\n"
        "    with connect():\n        print('connected')\n"
        "except ConnectionError as error:\n    print(error, '|', time.monotonic() - began)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=REPOSITORY,
        env={**os.environ, "RAY_ADDRESS": address},
        capture_output=True,
        text=True,
        timeout=60,
    )
    message, seconds = done.stdout.split("|")
    assert f"RAY_ADDRESS={address!r}" in message and "unset RAY_ADDRESS" in message
    assert float(seconds) < 5


@pytest.mark.parametrize("address", ["localhost", "http://localhost:8265/", "ray://:port", "10.0.0.1:"])
def test_an_address_that_is_none_is_named_too(address):
    with pytest.raises(ConnectionError, match="usually port 6379") as caught:
        _check_reachable(address)
    assert repr(address) in str(caught.value)


def test_a_given_cluster_is_used_and_left_running(private_ray):
    import ray

    address = ray.get_runtime_context().gcs_address
    script = (
        "from cluster.connection import capacity, connect\nfrom cluster.pool import Pool, Resources\n"
        "with connect():\n    with Pool('tests.cluster.toys:Squares', {}, Resources()) as pool:\n"
        "        print(capacity(), pool.call('square', 7))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=REPOSITORY,
        env={**os.environ, "RAY_ADDRESS": address},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.strip() == "(2.0, 0.0) 49", done.stderr
    assert capacity() == (2.0, 0.0)  # still there


def test_the_folder_of_a_killed_driver_is_removed_by_the_next():
    code = "import os; from cluster.connection import private_folder; print(private_folder(), flush=True); os._exit(9)"
    left = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()
    assert os.path.isdir(left)
    own = private_folder()
    try:
        assert own.is_dir() and not os.path.exists(left)
    finally:
        own.rmdir()


def test_a_process_that_is_connected_already_stays_so(private_ray):
    import ray

    before = ray.get_runtime_context().get_job_id()
    with connect():
        assert ray.get_runtime_context().get_job_id() == before
    assert ray.is_initialized()


def test_a_cluster_that_accepts_nobody_is_given_up(private_ray):
    """RAY_ADDRESS=auto finds a private Ray whose token it does not have: a sentence, soon, and the end."""
    code = (
        "import cluster.connection as c\n"
        "from jobs.core.logs import configure\n"
        "configure(); c.JOIN_WAIT_S = 3\n"
        "with c.connect(): print('in')"
    )
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {"RAY_ADDRESS": "auto"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and "in" not in done.stdout.split()
    said = done.stderr.strip().splitlines()[-1]
    assert "RAY_ADDRESS='auto' within 3 s (found on this machine: 127.0.0.1:" in said and "unset RAY_ADDRESS" in said
