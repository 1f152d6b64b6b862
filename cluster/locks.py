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
    """Hold the lock file `path` for the length of the block; yields False, without it, if `done()` while waiting.

    on_wait: told once whose lock it is. A lock is given up as left behind if its process on this host is gone, or if
    its file was not touched for EXPIRES_S, by this node's own clock.
    """
    token = secrets.token_hex(8)
    if not _acquire(path, token, done, on_wait):
        yield False
        return
    ended = threading.Event()
    beat = threading.Thread(target=_keep_alive, args=(path, ended), daemon=True, name=f"lock {path.name}")
    beat.start()
    try:
        yield True
    finally:
        ended.set()
        beat.join()
        if _read(path).get("token") == token:
            path.unlink(missing_ok=True)


def _acquire(path: Path, token: str, done: Callable[[], bool], on_wait: Callable[[str], None]) -> bool:
    """Create the lock file, waiting while another one is alive; False: `done()` meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    owner = {"token": token, "host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}
    told, touched, since = False, 0, time.monotonic()
    while True:
        if _create(path, json.dumps(owner)):
            return True
        if told and done():
            return False
        holder, now = _read(path), _touched(path)
        if now != touched:
            touched, since = now, time.monotonic()
        if _is_gone(holder) or time.monotonic() - since > EXPIRES_S:
            _remove(path, holder)
            continue
        if not told:
            told = True
            on_wait(f"{holder.get('host', '?')}, process {holder.get('pid', '?')}")
        time.sleep(POLL_S)


def _create(path: Path, text: str) -> bool:
    """Write a new lock file, whole from the first moment; False: there is one."""
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


def _keep_alive(path: Path, ended: threading.Event) -> None:
    while not ended.wait(HEARTBEAT_S):
        try:
            os.utime(path)
        except OSError:
            return


def _read(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {}


def _touched(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _started(pid: int) -> float:
    return psutil.Process(pid).create_time()


def _is_gone(holder: dict) -> bool:
    """Tell whether the lock is of a process on this host that is no more."""
    if holder.get("host") != socket.gethostname():
        return False
    try:
        return _started(holder["pid"]) != holder["started"]
    except (psutil.NoSuchProcess, KeyError, TypeError, ValueError):
        return True
    except psutil.Error:
        return False
