"""Workers in the test's own process instead of Ray's actors, and runs on tiny models."""

import importlib
from pathlib import Path

from jobs.core.options import load_config
from jobs.core.run import Run
from jobs.core.workers import Workers
from tests.tiny import DERM_TINY


class Worker:
    """What Workers.worker returns, without a process: builds the class and calls its methods."""

    def __init__(self, target: str, **kwargs):
        module, _, name = target.partition(":")
        self._object = getattr(importlib.import_module(module), name)(**kwargs)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_) -> None:
        pass

    def call(self, method: str, *args):
        return getattr(self._object, method)(*args)


def run_with(folder: Path, model=DERM_TINY, **options) -> Run:
    """Return a run on `model`; options use __ for dots."""
    given = {"run_dir": str(folder), "model.path": str(model), **options}
    return Run(load_config(None, [(key.replace("__", "."), str(value)) for key, value in given.items()]))


def run_here(monkeypatch, folder: Path, model=DERM_TINY, **options) -> Run:
    """Return a run on `model` whose workers are here; options use __ for dots."""
    monkeypatch.setattr(Workers, "worker", lambda self, target, count=1, **kwargs: Worker(target, **kwargs))
    return run_with(folder, model, **options)
