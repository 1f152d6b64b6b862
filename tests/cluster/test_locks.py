"""A lock between jobs: one at a time, waiting, and what a dead job leaves behind."""

import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from cluster import locks
from cluster.locks import exclusive


def never() -> bool:
    return False


def test_one_at_a_time(tmp_path):
    """Eight threads, five rounds each: never two inside, and nothing is left."""
    inside, most, waited = [], [], []

    def work() -> None:
        for _ in range(5):
            with exclusive(tmp_path / "lock", never, waited.append) as mine:
                assert mine
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.005)
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 40 and max(most) == 1 and waited and list(tmp_path.iterdir()) == []


def test_who_waits_goes_without_once_the_work_is_done(tmp_path):
    ready, holders, done = threading.Event(), [], threading.Event()

    def hold() -> None:
        with exclusive(tmp_path / "lock", never, holders.append):
            ready.set()
            time.sleep(0.3)
            done.set()
            time.sleep(0.5)

    holder = threading.Thread(target=hold)
    holder.start()
    ready.wait()
    with exclusive(tmp_path / "lock", done.is_set, holders.append) as mine:
        assert not mine
    holder.join()
    assert holders == [f"{socket.gethostname()}, process {os.getpid()}"]


def lock_of(path, host: str, pid: int, started: float = 0.0) -> None:
    path.write_text(json.dumps({"token": "x", "host": host, "pid": pid, "started": started}))


def test_a_lock_of_a_killed_process_here_is_gone_at_once(tmp_path):
    """Also if its number has a new process."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    for pid in (process.pid, os.getpid()):
        lock_of(tmp_path / "lock", socket.gethostname(), pid)
        began = time.monotonic()
        with exclusive(tmp_path / "lock", never, pytest.fail) as mine:
            assert mine and time.monotonic() - began < 2
            assert json.loads((tmp_path / "lock").read_text())["token"] != "x"


def test_a_lock_of_another_node_expires_without_heartbeats(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "EXPIRES_S", 1.0)
    lock_of(tmp_path / "lock", "another-node", 1)
    holders, began = [], time.monotonic()
    with exclusive(tmp_path / "lock", never, holders.append) as mine:
        assert mine and 0.9 < time.monotonic() - began < 10 and holders == ["another-node, process 1"]


def test_heartbeats_keep_it(tmp_path, monkeypatch):
    """As seen from another node, which only has the file's time to go by."""
    monkeypatch.setattr(locks, "HEARTBEAT_S", 0.1)
    monkeypatch.setattr(locks, "EXPIRES_S", 0.5)
    monkeypatch.setattr(locks, "_is_gone", lambda holder: False)
    order, ready = [], threading.Event()

    def hold() -> None:
        with exclusive(tmp_path / "lock", never, lambda _: None):
            ready.set()
            time.sleep(1.5)
            order.append("first")

    holder = threading.Thread(target=hold)
    holder.start()
    ready.wait()
    with exclusive(tmp_path / "lock", never, lambda _: None):
        order.append("second")
    holder.join()
    assert order == ["first", "second"]


def test_without_hard_links(tmp_path, monkeypatch):
    def refuse(*_) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    test_one_at_a_time(tmp_path)
