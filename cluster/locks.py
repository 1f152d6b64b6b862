"""Locks between jobs that share a folder, on one node or on several; one left by a dead job expires by itself."""

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

HEARTBEAT_S = 5.0
EXPIRES_S = 30.0  # without a heartbeat
POLL_S = 0.1


@contextmanager
def exclusive(path: Path, done: Callable[[], bool], on_wait: Callable[[str], None]) -> Iterator[bool]:
    """Hold the lock file `path` while the block runs; yield False, without the lock, if `done()` while waiting.

    on_wait: called once with the lock's holder. A lock counts as abandoned if its process on this host is gone, or if
    its file was not touched for EXPIRES_S by this node's own clock.
    """
    token = secrets.token_hex(8)
    if not _acquire(path, token, done, on_wait):
        yield False
        return
    released = threading.Event()
    beat = threading.Thread(target=_keep_alive, args=(path, released), daemon=True, name=f"lock {path.name}")
    beat.start()
    try:
        yield True
    finally:
        released.set()
        beat.join()
        if _read(path).get("token") == token:
            path.unlink(missing_ok=True)


def _acquire(path: Path, token: str, done: Callable[[], bool], on_wait: Callable[[str], None]) -> bool:
    """Create the lock file, after waiting for its holder; return False if `done()` meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    owner = {"token": token, "host": socket.gethostname(), "pid": os.getpid(), "started": _start_time(os.getpid())}
    announced, modified, since = False, 0, time.monotonic()
    while True:
        if _create(path, json.dumps(owner)):
            return True
        if announced and done():
            return False
        holder, modified_now = _read(path), _modified_ns(path)
        if modified_now != modified:
            modified, since = modified_now, time.monotonic()
        if _is_gone(holder) or time.monotonic() - since > EXPIRES_S:
            _remove(path, holder)
            continue
        if not announced:
            announced = True
            on_wait(f"{holder.get('host', '?')}, process {holder.get('pid', '?')}")
        time.sleep(POLL_S)


def _create(path: Path, text: str) -> bool:
    """Create the lock file and its text in one step; return False if it exists."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
    temporary.write_text(text)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        try:
            with open(path, "x") as file:
                file.write(text)
        except FileExistsError:
            return False
    finally:
        temporary.unlink()
    return True


def _remove(path: Path, holder: dict) -> None:
    """Remove a lock that was left behind, unless another waiter has replaced it."""
    if _read(path) == holder:
        path.unlink(missing_ok=True)


def _keep_alive(path: Path, released: threading.Event) -> None:
    while not released.wait(HEARTBEAT_S):
        try:
            os.utime(path)
        except OSError:
            return


def _read(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {}


def _modified_ns(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _start_time(pid: int) -> float:
    return psutil.Process(pid).create_time()


def _is_gone(holder: dict) -> bool:
    """Tell whether the lock's process was on this host and has ended."""
    if holder.get("host") != socket.gethostname():
        return False
    try:
        return _start_time(holder["pid"]) != holder["started"]
    except (psutil.NoSuchProcess, KeyError, TypeError, ValueError):
        return True
    except psutil.Error:
        return False
