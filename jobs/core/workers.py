"""The processes that compute for a run: replicas of a model, single workers, sentence-transformers.

Ray starts when the first of them is needed, and not before.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from actors.specs import ModelSpec
    from cluster.group import Group
    from cluster.pool import Pool

from jobs.config.schema import ReplicasConfig

LOG = logging.getLogger("jobs.core")

REPLICA = "actors.engine.replica:LlavaReplica"
EMBEDDER = "actors.embedder:Embedder"
_TOO_SMALL = (
    "A worker needs {:g} cores and {:g} GPUs on one node; there are {:g} and {:g} in all: lower replicas.cpus / "
    "replicas.gpus, add nodes, or, on a cluster that grows by itself, set replicas.count."
)


class Meter:
    """The GPU seconds of one stage: those of the pools that were hosted for it."""

    def __init__(self) -> None:
        self.pools: list[Pool | Group] = []

    @property
    def gpu_seconds(self) -> float:
        """GPUs times the seconds for which they were held; complete when the pools are closed."""
        return sum(pool.gpu_seconds for pool in self.pools)


class Workers:
    """Hosts the workers of one run.

    parent: the workers of a run in progress; its connection and its sentence-transformers are shared, and a worker
    then has replicas.cpus cores in place of a whole node's. beside_others: replicas of other runs are on the
    same machines.
    """

    def __init__(self, replicas: ReplicasConfig, parent: "Workers | None" = None, beside_others: bool = False):
        self._wanted = replicas
        self._parent = parent
        self._beside_others = beside_others
        self._cleanup = ExitStack()
        self._connected = False
        self._embedders: dict[str, Pool] = {}
        self._meters: list[Meter] = []  # of the stages that are being made, the innermost last

    def close(self) -> None:
        """End the sentence-transformers and leave Ray."""
        self._cleanup.close()

    def connect(self) -> None:
        """Connect to Ray, once."""
        if self._parent is not None:
            self._parent.connect()
        elif not self._connected:
            from cluster.connection import connect

            self._cleanup.enter_context(connect())
            self._connected = True

    @contextmanager
    def meter(self) -> Iterator[Meter]:
        """Measure the pools hosted in the block, except those of a block inside, which belong to the inner stage."""
        self._meters.append(Meter())
        try:
            yield self._meters[-1]
        finally:
            self._meters.pop()

    def replicas(self, spec: "ModelSpec", target: str = REPLICA, **kwargs) -> "Pool":
        """Return a pool of workers that each hold a model, spread over what the cluster has."""
        from cluster.connection import capacity, is_private, room
        from cluster.pool import Resources

        self.connect()
        wanted = self._wanted
        fit = room(wanted.cpus, wanted.gpus)
        if fit < 1 and (wanted.count == "auto" or is_private()):
            raise ValueError(_TOO_SMALL.format(wanted.cpus, wanted.gpus, *capacity()))
        if wanted.count != "auto" and wanted.count > fit:
            LOG.warning(f"replicas: {wanted.count} wanted, room for {fit} now; the others start when there is room")
        spec = replace(spec, gpus=wanted.gpus, sharers=1 if wanted.gpus else self._count_sharers())
        kwargs |= {"spec": spec, "max_rows": wanted.max_rows}
        return self._host(target, kwargs, Resources(wanted.cpus, wanted.gpus, wanted.count))

    def worker(self, target: str, count: int = 1, **kwargs) -> "Pool":
        """Return workers with one GPU each; without GPUs one gets all cores of a node, several get replicas.cpus."""
        from cluster.connection import capacity, is_private, largest_node
        from cluster.pool import Resources

        self.connect()
        wanted = self._wanted
        shares = self._parent is not None or wanted.gpus or count > 1
        cpus = wanted.cpus if shares else max(wanted.cpus, largest_node())
        available = capacity()
        if cpus > available[0] or (wanted.gpus and available[1] < 1):
            if is_private():
                raise ValueError(_TOO_SMALL.format(cpus, min(1, wanted.gpus), *available))
            LOG.warning(f"{target}: waiting for a node with {cpus:g} cores{' and a GPU' if wanted.gpus else ''}")
        return self._host(target, kwargs, Resources(cpus, 1 if wanted.gpus else 0, count))

    def group(self, target: str, count: int, folder: Path, **kwargs) -> "Pool | Group":
        """Return workers with one GPU each that run a call together: `count`, or as many as have room.

        One is a worker of its own. folder: for Ray Train's notes, seen by all nodes.
        """
        from cluster.connection import room
        from cluster.group import Group
        from cluster.pool import Resources

        if count > 1:
            self.connect()
            count = min(count, room(self._wanted.cpus, 1 if self._wanted.gpus else 0))
        if count <= 1:
            return self.worker(target, **kwargs)
        group = Group(target, kwargs, Resources(self._wanted.cpus, 1 if self._wanted.gpus else 0, count), folder)
        if self._meters:
            self._meters[-1].pools.append(group)
        return group

    def count_workers(self) -> int:
        """Return how many workers with one GPU each the replicas allow; without GPUs replicas.count, 1 if auto."""
        from cluster.connection import is_private, room

        wanted = self._wanted
        if self._parent is not None or (wanted.count == "auto" and not wanted.gpus):
            return 1
        self.connect()
        fit = max(1, room(wanted.cpus, 1 if wanted.gpus else 0))
        if wanted.count == "auto":
            return fit
        count = math.ceil(wanted.count * (wanted.gpus or 1))
        return min(count, fit) if is_private() else count

    def embedder(self, name: str) -> "Pool":
        """Return the worker that holds a sentence-transformer; it lives as long as the run."""
        from cluster.pool import Pool, Resources

        if self._parent is not None:
            return self._parent.embedder(name)
        self.connect()
        if name not in self._embedders:
            pool = Pool(EMBEDDER, {"name": name}, Resources(cpus=0))
            self._embedders[name] = self._cleanup.enter_context(pool)
        return self._embedders[name]

    def _host(self, target: str, kwargs: dict, resources) -> "Pool":
        from cluster.pool import Pool

        LOG.debug(f"{target}: {resources.count} workers of {resources.cpus:g} cores and {resources.gpus:g} GPUs each")
        pool = Pool(target, kwargs, resources)
        if self._meters:
            self._meters[-1].pools.append(pool)
        return pool

    def _count_sharers(self) -> int:
        """Return how many replicas without a GPU one machine may hold now; those of runs beside this one count, too."""
        from cluster.connection import room_on_one

        fit = room_on_one(self._wanted.cpus, 0)
        if self._wanted.count == "auto" or (self._beside_others and fit):
            return fit
        return min(self._wanted.count, fit or self._wanted.count)
