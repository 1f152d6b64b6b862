"""What the tests of lost and joining nodes, GPUs and killed drivers run in a process of its own.

    python -m tests.cluster.scenarios devices | nodes | asked_for | trials | digests FOLDER

The last line of the output is one JSON value.
"""

import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.connection import connect
from cluster.pool import Outcome, Pool, Resources
from cluster.tables import PartTable

TOYS = "tests.cluster.toys"
UNITS = 400


@contextmanager
def simulated(**head) -> Iterator:
    """Yield a Ray cluster on this machine to which nodes can be added."""
    import ray
    from ray.cluster_utils import Cluster

    folder = tempfile.mkdtemp(prefix="prn-", dir="/tmp")
    os.environ["RAY_TMPDIR"] = folder
    (Path(folder) / "ray").mkdir()
    quiet = {"include_dashboard": False, "dashboard_agent_listen_port": 0, "node_ip_address": "127.0.0.1"}
    cluster = Cluster(initialize_head=True, head_node_args={**quiet, **head})
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def devices() -> dict:
    """Map units over one replica per GPU, then over two per GPU, on a node with two GPUs."""
    found = {}
    seconds = [0.05 if n % 2 else 0.2 for n in range(40)]
    with simulated(num_cpus=4, num_gpus=2):
        for name, gpus, count in (("whole", 1, 2), ("half", 0.5, 4)):
            pool = Pool(f"{TOYS}:Meets", {}, Resources(1, gpus, "auto"))
            with tempfile.TemporaryDirectory() as folder, pool:
                list(pool.map("meet", [(n, (n, folder, count)) for n in range(count)]))
                found[name] = _plain(pool.map("unit", [(n, (s,)) for n, s in enumerate(seconds)]))
    return found


class Mapping(threading.Thread):
    """A map that runs while the main thread adds and removes nodes."""

    def __init__(self, count, units: int, unit_s: float):
        super().__init__(daemon=True)
        self._resources, self._items = Resources(count=count), [(n, (unit_s,)) for n in range(units)]
        self.rows: list[dict] = []

    def run(self) -> None:
        with Pool(f"{TOYS}:Meets", {}, self._resources) as pool:
            for outcome in pool.map("unit", self._items):
                self.rows += _plain([outcome])

    def until(self, count: int, *nodes) -> None:
        """Wait until `count` units were done on the given nodes."""
        names, deadline = {node.node_id for node in nodes}, time.monotonic() + 60
        while sum(row["node"] in names for row in self.rows) < count:
            if time.monotonic() > deadline or not self.is_alive():
                raise TimeoutError(f"{count} units on {names} did not come: {self.rows}")
            time.sleep(0.05)


def nodes() -> dict:
    """Work on one node, on two, on none, and on a third."""
    with simulated(num_cpus=0) as cluster:
        first = cluster.add_node(num_cpus=1)
        mapping = Mapping("auto", 60, 0.2)
        mapping.start()
        mapping.until(3, first)
        second = cluster.add_node(num_cpus=2)
        mapping.until(8, second)
        cluster.remove_node(first, allow_graceful=False)
        mapping.until(16, second)
        cluster.remove_node(second, allow_graceful=False)
        third = cluster.add_node(num_cpus=2)
        mapping.join()
        return {"rows": mapping.rows, "nodes": [node.node_id for node in (first, second, third)]}


def asked_for() -> dict:
    """Ask for three actors where there is room for one; two more find room later."""
    with simulated(num_cpus=1) as cluster:
        mapping = Mapping(3, 200, 0.1)  # more than a node takes to come up
        mapping.start()
        mapping.until(3, cluster.head_node)
        second = cluster.add_node(num_cpus=2)
        mapping.join()
        return {"rows": mapping.rows, "nodes": [cluster.head_node.node_id, second.node_id]}


def trials() -> dict:
    """Let three trials make stages with and without the one GPU, which meet those of the others while they are made."""
    from cluster.tuning import Maker, Task, run_trials

    chains = {
        ("a",): [Task("a-gpu", (1, ("b-cpu", "c-cpu", "b-gpu.asked"))), Task("a-cpu", (0, ("b-gpu.began",)))],
        ("b",): [Task("b-cpu", (0, ("a-gpu.began",))), Task("b-gpu", (1, ("a-cpu.began",)))],
        ("c",): [Task("c-cpu", (0, ("a-gpu.began",)))],
    }
    with simulated(num_cpus=2, num_gpus=1), tempfile.TemporaryDirectory() as folder:
        maker, root = Maker(f"{TOYS}:Borrows", {"folder": folder}, parallel=3), Path(folder)
        ends = run_trials(chains, maker, root / "tune", root / "log.jsonl", lambda event: None)
        rows = {task.name: json.loads((root / task.name).read_text()) for c in chains.values() for task in c
                if (root / task.name).exists()}  # fmt: skip
    return {"errors": {key: end["error"] for (key,), end in ends.items()}, "rows": rows}


def digests(folder: str) -> int:
    """Write the digests that are not in `folder` yet, and log every one that was written."""
    table = PartTable(Path(folder) / "units")
    finished = table.finished()
    work = [(n, (n,)) for n in range(UNITS) if str(n) not in finished]
    with connect(cpus=3), Pool(f"{TOYS}:Digests", {}, Resources(count="auto")) as pool:
        for outcome in pool.map("digest", work):
            table.add(str(outcome.key), _plain([outcome]))
            with open(Path(folder) / "log", "a") as log:
                log.write(f"{outcome.key}\n")
    return len(work)


def _plain(outcomes) -> list[dict]:
    return [_row(outcome) for outcome in outcomes]


def _row(outcome: Outcome) -> dict:
    values = outcome.value if isinstance(outcome.value, dict) else {"value": outcome.value}
    return {"key": outcome.key, "error": outcome.error, "attempts": outcome.attempts, **values}


if __name__ == "__main__":
    scenarios: dict[str, Callable] = {f.__name__: f for f in (devices, nodes, asked_for, trials, digests)}
    print(json.dumps(scenarios[sys.argv[1]](*sys.argv[2:])))
