"""A cluster that is lost under a job: one sentence and an end, where Ray would hang for a minute and say nothing."""

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
# Ray ends a process that has not reached its head for so long. A head that comes back in time is not lost.
_RAY_WAITS_S = float(os.environ.get("RAY_gcs_rpc_server_reconnect_timeout_s", "60"))  # noqa: SIM112 (Ray's name)
HEAD_LOST_AFTER_S = 0.5 * _RAY_WAITS_S
# A process belongs to the raylet of its machine, and to no other that is started later. Its port refuses connections at
# once when it is gone; Ray notices after some ten seconds, and ends the process. One connection that times out, on a
# machine that is busy, is no loss.
RAYLET_LOST_AFTER_S = 6.0
CONNECT_S = 5.0
_watches: list["Watch"] = []  # the last one


class Watch(threading.Thread):
    """Looks whether the cluster answers; ends the process, with a sentence, when it has not for some seconds.

    places: who listens where, as (words, host, port, seconds after which it is lost). It ends the process itself, since
    the main thread may wait in Ray for an answer that never comes; what was finished is in files.
    """

    def __init__(self, places: list[tuple[str, str, int, float]]):
        super().__init__(daemon=True, name="lost")
        self._places, self._over = places, threading.Event()
        self._seen = [time.monotonic()] * len(places)
        self.missing: str | None = None
        _watches[:] = [self]

    def run(self) -> None:
        """Look until it is told to stop."""
        while not self._over.wait(LOOK_EVERY_S):
            if self.look() and not self._over.is_set():
                sys.stdout.flush()
                LOG.error(f"{Path(sys.argv[0]).stem}: {reason()}")
                os._exit(1)

    def look(self) -> bool:
        """Note who does not answer now; tell whether somebody has not for too long."""
        missing, too_long = None, False
        for number, (who, host, port, seconds) in enumerate(self._places):
            if _answers(host, port):
                self._seen[number] = time.monotonic()
            else:
                missing = missing or who
                too_long = too_long or time.monotonic() - self._seen[number] >= seconds
        if not self._over.is_set():  # what ends after the work is no loss
            self.missing = missing
        return too_long

    def stop(self) -> None:
        """Look no more."""
        self._over.set()


def watch(address: str) -> Watch:
    """Start to look at the cluster to which this process is connected; address: as in RAY_ADDRESS."""
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
    """Return, in a sentence, who of the cluster did not answer when it was looked for last; None: all did."""
    missing = next((watch.missing for watch in _watches), None)
    return missing and (
        f"The Ray cluster was lost: {missing} does not answer. What was finished is kept; start the cluster again, and "
        "the same command continues."
    )


def _head(address: str) -> tuple[str, str, int, float]:
    host, _, port = address.rpartition(":")
    return f"its head at {address}", host.strip("[]"), int(port), HEAD_LOST_AFTER_S


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=CONNECT_S).close()
    except OSError as error:
        return error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS)  # it is this process that lacks something
    return True
