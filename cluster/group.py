"""Workers that run one call together, as the ranks of a torch process group. Ray Train places and connects them."""

import importlib
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

from cluster.connection import protect
from cluster.pool import DEATHS, Resources, WorkerDied
from cluster.text import one_line

protect()
import ray  # noqa: E402
from ray.util.queue import Empty, Queue  # noqa: E402

LOOK_EVERY_S = 1.0  # whether the workers still run
STOP_S = 30.0  # for an orderly end


class Group:
    """`resources.count` workers of the class `target` ("package.module:Class"), each built with `kwargs`.

    folder: for Ray Train's notes, seen by all nodes. The workers live as long as a call. A worker that loses another
    one is expected to raise a ConnectionError.
    """

    def __init__(self, target: str, kwargs: dict, resources: Resources, folder: Path):
        self._target, self._kwargs, self._resources, self._folder = target, kwargs, resources, folder
        self._count = int(resources.count)  # ValueError: "auto"
        self.gpu_seconds = 0.0  # GPUs times the seconds that calls held them

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, *exception) -> None:
        """Nothing is held between calls."""

    def stream(self, method: str, *args) -> Generator[Any, None, None]:
        """Call the generator `method(*args)` on all workers, and yield the items of the first one as they come.

        What a worker raises is raised here. WorkerDied: a worker's process died.
        """
        items, started = Queue(actor_options={"num_cpus": 0}), time.monotonic()
        folder = str(self._folder.absolute())
        work = {"target": self._target, "kwargs": self._kwargs, "method": method, "args": args, "items": items}
        fit = ray.remote(num_cpus=0, max_retries=0)(_fit).remote(work, self._resources, self._count, folder)
        try:
            while True:
                ended = bool(ray.wait([fit], timeout=0)[0])
                try:
                    yield items.get(timeout=None if ended and items.qsize() else LOOK_EVERY_S)
                except Empty:
                    if ended:
                        break
            self._raise(ray.get(fit))
        finally:
            _stop(fit)
            items.shutdown(force=True)
            self.gpu_seconds += self._count * self._resources.gpus * (time.monotonic() - started)

    def _raise(self, failures: list[Exception]) -> None:
        """Raise the failure that the others follow from: a worker's own, else a death, else a lost connection."""
        for failure in sorted(failures, key=lambda each: (isinstance(each, ConnectionError), isinstance(each, DEATHS))):
            if isinstance(failure, DEATHS):
                raise WorkerDied(f"A worker running {self._target} died ({one_line(failure)}).")
            raise failure


def _stop(fit: ray.ObjectRef) -> None:
    """End the workers, if they still run: Ray Train takes an interrupt as an order to end them."""
    ray.cancel(fit)
    ray.wait([fit], timeout=STOP_S)
    ray.cancel(fit, force=True)


def _fit(work: dict[str, Any], resources: Resources, count: int, folder: str) -> list[Exception]:
    """Run the workers to their end; return what they raised."""
    from ray.train import RunConfig, ScalingConfig, WorkerGroupError
    from ray.train.torch import TorchTrainer

    share = {"CPU": resources.cpus} | ({"GPU": resources.gpus} if resources.gpus else {})
    scaling = ScalingConfig(num_workers=count, use_gpu=bool(resources.gpus), resources_per_worker=share)
    trainer = TorchTrainer(
        _work, train_loop_config=work, scaling_config=scaling, run_config=RunConfig(name="group", storage_path=folder)
    )
    try:
        trainer.fit()
    except WorkerGroupError as error:  # a death is what the check of a worker's health failed with
        return [getattr(each, "health_check_failure", each) for each in error.worker_failures.values()]
    return []


def _work(work: dict[str, Any]) -> None:
    """Run the call in one worker; the first one hands its items on."""
    from ray.train import get_context

    module, _, name = work["target"].partition(":")
    worker = getattr(importlib.import_module(module), name)(**work["kwargs"])
    for item in getattr(worker, work["method"])(*work["args"]):
        if get_context().get_world_rank() == 0:
            work["items"].put(item)
