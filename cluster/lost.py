"""Ends a job whose cluster is lost, with a message; Ray would hang for a minute and say nothing."""

import errno
import logging
import os
import socket
import sys
import threading
import time
from pathlib import Path

LOG = logging.getLogger("cluster")
LOOK_EVERY_S = 0.5
# Ray ends a process that has not reached its head for this time (s). A head that comes back earlier is not lost.
_RAY_WAITS_S = float(os.environ.get("RAY_gcs_rpc_server_reconnect_timeout_s", "60"))  # noqa: SIM112 (Ray's name)
HEAD_LOST_AFTER_S = 0.5 * _RAY_WAITS_S
# A process belongs to the raylet of its machine, and cannot join one that is started later. The port of a dead raylet
# refuses connections at once; Ray notices after some ten seconds, and ends the process. A single connection that times
# out on a busy machine does not count.
RAYLET_LOST_AFTER_S = 6.0
CONNECT_S = 5.0
_watches: list["Watch"] = []  # the last one


class Watch(threading.Thread):
    """Polls the cluster; ends the process, with a message, when it has not answered for some seconds.

    places: (name, host, port, seconds without an answer after which it is lost). The thread ends the process itself,
    since the main thread may wait in Ray for an answer that never comes; finished work is in files.
    """

    def __init__(self, places: list[tuple[str, str, int, float]]):
        super().__init__(daemon=True, name="lost")
        self._places, self._over = places, threading.Event()
        self._seen = [time.monotonic()] * len(places)
        self.missing: str | None = None
        _watches[:] = [self]

    def run(self) -> None:
        """Poll until `stop`."""
        while not self._over.wait(LOOK_EVERY_S):
            if self.look() and not self._over.is_set():
                sys.stdout.flush()
                LOG.error(f"{Path(sys.argv[0]).stem}: {reason()}")
                os._exit(1)

    def look(self) -> bool:
        """Poll once: set `missing`; tell whether a place has not answered for too long."""
        missing, too_long = None, False
        for number, (who, host, port, seconds) in enumerate(self._places):
            if _answers(host, port):
                self._seen[number] = time.monotonic()
            else:
                missing = missing or who
                too_long = too_long or time.monotonic() - self._seen[number] >= seconds
        if not self._over.is_set():  # after `stop` the cluster may end
            self.missing = missing
        return too_long

    def stop(self) -> None:
        """End the polling."""
        self._over.set()


def watch(address: str) -> Watch:
    """Start to watch the cluster to which this process is connected; address: as in RAY_ADDRESS."""
    import ray

    if address.startswith("ray://"):
        head = address.removeprefix("ray://")
        watched = Watch([_head(head)])
    else:
        context = ray.get_runtime_context()
        places = [_head(context.gcs_address)]
        for node in ray.nodes():
            if node["NodeID"] == context.get_node_id():
                raylet = node["NodeManagerAddress"], node["NodeManagerPort"]
                places.append(("the raylet of this machine", *raylet, RAYLET_LOST_AFTER_S))
        watched = Watch(places)
    watched.start()
    return watched


def reason() -> str | None:
    """Return a sentence on the part of the cluster that did not answer the last poll; None: all parts did."""
    missing = next((watch.missing for watch in _watches), None)
    return missing and (
        f"The Ray cluster was lost: {missing} does not answer. Finished work is kept; start the cluster again, and the "
        "same command continues."
    )


def _head(address: str) -> tuple[str, str, int, float]:
    host, _, port = address.rpartition(":")
    return f"its head at {address}", host.strip("[]"), int(port), HEAD_LOST_AFTER_S


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=CONNECT_S).close()
    except OSError as error:
        return error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS)  # this process is at fault
    return True
