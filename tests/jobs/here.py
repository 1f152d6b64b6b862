"""Workers in the test's own process instead of Ray's actors, and runs on tiny models."""

import importlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.pool import Outcome
from jobs.core.options import load_config
from jobs.core.run import Run
from jobs.core.workers import EMBEDDER, REPLICA, Workers
from tests.tiny import DERM_TINY


class Worker:
    """What Workers.worker and .replicas return, without a process: builds the class and calls its methods."""

    gpu_seconds = 0.0

    def __init__(self, target: str, **kwargs):
        module, _, name = target.partition(":")
        self._object = getattr(importlib.import_module(module), name)(**kwargs)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_) -> None:
        pass

    def call(self, method: str, *args):
        return getattr(self._object, method)(*args)

    def stream(self, method: str, *args) -> Iterator:
        return iter(self.call(method, *args))

    def map(self, method: str, items: Iterable[tuple[Any, tuple]]) -> Iterator[Outcome]:
        return (Outcome(key, self.call(method, *args)) for key, args in items)


def run_with(folder: Path, model=DERM_TINY, config: str | None = None, **options) -> Run:
    """Return a run on `model`; options use __ for dots."""
    given = {"run_dir": str(folder), "model.path": str(model), **options}
    return Run(load_config(config, [(key.replace("__", "."), str(value)) for key, value in given.items()]))


def run_here(monkeypatch, folder: Path, model=DERM_TINY, config: str | None = None, **options) -> Run:
    """Return a run on `model` whose workers are here; options use __ for dots."""

    def replicas(self, spec, target: str = REPLICA, **kwargs) -> Worker:
        return Worker(target, spec=replace(spec, gpus=0), max_rows=64, **kwargs)

    monkeypatch.setattr(Workers, "worker", lambda self, target, count=1, **kwargs: Worker(target, **kwargs))
    monkeypatch.setattr(Workers, "replicas", replicas)
    monkeypatch.setattr(Workers, "embedder", lambda self, name: Worker(EMBEDDER, name=name))
    return run_with(folder, model, config, **options)
