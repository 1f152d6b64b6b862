"""Workers that run one call together, as the ranks of a torch process group. Ray Train places and connects them."""

import importlib
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

from cluster.connection import protect
from cluster.pool import DEATHS, Resources, WorkerDied, unwrap
from cluster.text import one_line

protect()
import ray  # noqa: E402
from ray.exceptions import RayTaskError, WorkerCrashedError  # noqa: E402
from ray.util.queue import Empty, Queue  # noqa: E402
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: E402

LOOK_EVERY_S = 1.0  # whether the workers still run
STOP_S = 30.0  # for an orderly end


class Group:
    """`resources.count` workers of the class `target` ("package.module:Class"), each built with `kwargs`.

    folder: for Ray Train's notes, seen by all nodes. The workers live as long as a call, which is tried once. A worker
    that loses another one is expected to raise a ConnectionError. With gpus 0 the workers see no GPU.
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

        What a worker raises is raised here. WorkerDied: a worker's process died, or there was no room for all of them.
        """
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options = {"num_cpus": 0, "scheduling_strategy": here}
        items, started = Queue(actor_options=options), None
        work = {"target": self._target, "kwargs": self._kwargs, "method": method, "args": args, "items": items}
        fit = ray.remote(max_retries=0, **options)(_fit).remote(
            work, self._resources, self._count, str(self._folder.absolute())
        )
        try:
            while True:
                ended = bool(ray.wait([fit], timeout=0)[0])
                try:
                    item = items.get(timeout=None if ended and items.qsize() else LOOK_EVERY_S)
                except Empty:
                    if ended:
                        break
                    continue
                if started is None:
                    started = time.monotonic()
                else:
                    yield item
            self._raise(ray.get(fit))
        except (*DEATHS, WorkerCrashedError) as error:
            raise self._died(error) from None
        except RayTaskError as error:
            raise unwrap(error) from error
        finally:
            _stop(fit)
            items.shutdown(force=True)
            if started is not None:
                self.gpu_seconds += self._count * self._resources.gpus * (time.monotonic() - started)

    def _raise(self, failures: list[Exception]) -> None:
        """Raise the failure that the others follow from: a worker's own, else a death, else a lost connection."""
        for failure in sorted(failures, key=lambda each: (isinstance(each, ConnectionError), isinstance(each, DEATHS))):
            raise self._died(failure) if isinstance(failure, (*DEATHS, ConnectionError)) else failure

    def _died(self, error: BaseException) -> WorkerDied:
        return WorkerDied(f"A worker running {self._target} died ({one_line(error)}); start the same command again.")


def _stop(fit: ray.ObjectRef) -> None:
    """End the workers, if they still run: Ray Train takes an interrupt as an order to end them."""
    ray.cancel(fit)
    ray.wait([fit], timeout=STOP_S)
    ray.cancel(fit, force=True)


def _fit(work: dict[str, Any], resources: Resources, count: int, folder: str) -> list[Exception]:
    """Run the workers to their end, once; return what they, or the process over them, raised."""
    from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
    from ray.train.torch import TorchTrainer

    share = {"CPU": resources.cpus} | ({"GPU": resources.gpus} if resources.gpus else {})
    once = FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0)
    trainer = TorchTrainer(
        _work,
        train_loop_config=work,
        scaling_config=ScalingConfig(num_workers=count, use_gpu=bool(resources.gpus), resources_per_worker=share),
        run_config=RunConfig(
            name="group",
            storage_path=folder,
            failure_config=once,
            worker_runtime_env={} if resources.gpus else {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}},
        ),
    )
    try:
        trainer.fit()
    except WorkerGroupError as error:  # a death is what the check of a worker's health failed with
        return [getattr(each, "health_check_failure", each) for each in error.worker_failures.values()]
    except ControllerError as error:
        return [error.controller_failure]
    return []


def _work(work: dict[str, Any]) -> None:
    """Run the call in one worker; the first one says that it has begun, and hands its items on."""
    from ray.train import get_context

    is_first = get_context().get_world_rank() == 0
    if is_first:
        work["items"].put(None)
    module, _, name = work["target"].partition(":")
    worker = getattr(importlib.import_module(module), name)(**work["kwargs"])
    for item in getattr(worker, work["method"])(*work["args"]):
        if is_first:
            work["items"].put(item)
