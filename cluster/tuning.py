"""Ray Tune over settings that share stages: every stage is made once, whichever trials ask for it.

A trial is a coordinator without a core or a GPU: it asks the broker for its stages in order, and reports the last one's
result. The broker gives stages to workers outside the trials' placement groups, `Maker.parallel` at a time; a stage
itself requests the cores and GPUs that it needs. If another trial asked for a stage first, the trial waits for it.
A worker that dies is replaced and its stage tried again; a stage that raises has failed, and so has every trial that
needs it, while the others go on.
"""

import asyncio
import importlib.util
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from cluster.pool import ATTEMPTS, Pool, Resources, WorkerDied
from cluster.text import one_line

import ray  # isort: skip  (cluster.pool protects it first)
from ray import tune  # isort: skip

NEWS_EVERY_S = 1.0
TRIALS_PER_STAGE = 4  # coordinators per parallel stage, so that not all of them wait for the same stage
RESTARTS = 3  # of a trial whose process died
# The smallest request that Tune allows a trial; a fraction of a core would take a whole one from the stages.
_ONE_BYTE = {"memory": 1}
Key = tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """One stage: its name, by which equal stages are known, and the other arguments of `make(name, *args)`."""

    name: str
    args: tuple = ()


@dataclass(frozen=True)
class Maker:
    """What makes stages: a class ("package.module:Class") built with kwargs, whose `make(name, *args)` returns a dict.

    The dict has "made" (False: it was there already) and numbers to report. parallel: stages at a time.
    """

    target: str
    kwargs: dict = field(default_factory=dict)
    parallel: int = 1


@dataclass(frozen=True)
class Sampled:
    """How many settings Optuna suggests, each once, and the columns to optimise: {"score": "max", "gib": "min"}."""

    trials: int
    objectives: Mapping[str, str]
    seed: int = 0
    batch: int = 8  # suggestions from the same results; fixed, so that a resumed search suggests the same


class _Broker:
    """The only actor that starts stages. It writes one line to `log` for each that was made, or failed."""

    def __init__(self, maker: Maker, log: str):
        self._log = Path(log)
        self._results: dict[str, asyncio.Future] = {}
        self._news: list[dict] = []
        self._workers: asyncio.Queue[Pool] = asyncio.Queue()
        self._threads = ThreadPoolExecutor(maker.parallel)  # a worker's call waits in one; asyncio's own are few
        for _ in range(maker.parallel):
            self._workers.put_nowait(Pool(maker.target, maker.kwargs, Resources(cpus=0)))

    async def make(self, task: Task) -> dict:
        """Wait until the stage is made; return {"error": None or the reason, ...the maker's dict}."""
        if task.name not in self._results:
            self._results[task.name] = asyncio.ensure_future(self._make_task(task))
        return await asyncio.shield(self._results[task.name])

    async def news(self) -> list[dict]:
        """Return what happened since the last call."""
        news, self._news = self._news, []
        return news

    async def _make_task(self, task: Task) -> dict:
        worker = await self._workers.get()
        try:
            return await self._try_task(worker, task)
        finally:
            self._workers.put_nowait(worker)

    async def _try_task(self, worker: Pool, task: Task) -> dict:
        started, reason, tries = time.time(), "", 0
        self._news.append({"event": "started", "name": task.name})
        while tries < ATTEMPTS:
            tries += 1
            try:
                call = partial(worker.call, "make", task.name, *task.args)
                report = await asyncio.get_running_loop().run_in_executor(self._threads, call)
            except WorkerDied as error:  # the stage's own, or one that the stage started
                reason = str(error)
            except Exception as error:
                reason = str(error) if isinstance(error, ValueError | RuntimeError) else one_line(error)
                break
            else:
                if report["made"]:
                    self._note("made", task, started, tries=tries, pid=report["pid"])
                return {**report, "error": None}
        self._note("failed", task, started, tries=tries, error=reason)
        return {"error": reason}

    def _note(self, event: str, task: Task, started: float, **more) -> None:
        row = {
            "event": event,
            "name": task.name,
            "started": started,
            "seconds": round(time.time() - started, 3),
            **more,
        }
        self._news.append(row)
        with open(self._log, "a") as log:
            log.write(json.dumps(row) + "\n")


def _coordinate(config: dict, broker: Any, chains: Mapping[Key, Sequence[Task]]) -> None:
    """Ask for one setting's stages in order, and report the last one's result."""
    ends: dict = {}
    for task in chains[tuple(config["setting"].values())]:
        ends = ray.get(broker.make.remote(task))
        if ends["error"]:
            break
    tune.report({**ends, "failed": int(bool(ends.get("error")))})


class _Watch(tune.Callback):
    """Passes events to the job, and keeps every trial's last report."""

    def __init__(self, broker, on_event: Callable[[dict], None]):
        self._broker, self._on_event, self._last_news = broker, on_event, 0.0
        self.ends: dict[Key, dict] = {}

    def __reduce__(self):  # Tune pickles its callbacks; a resume needs only the artifacts
        return _Watch, (None, print)

    def tell(self) -> None:
        """Pass on the broker's news."""
        self._last_news = time.monotonic()
        for event in ray.get(self._broker.news.remote()):
            self._on_event(event)

    def on_step_end(self, iteration, trials, **info) -> None:
        if time.monotonic() - self._last_news >= NEWS_EVERY_S:
            self.tell()

    def on_trial_complete(self, iteration, trials, trial, **info) -> None:
        self._end(trial, trial.last_result)

    def on_trial_error(self, iteration, trials, trial, **info) -> None:
        self._end(trial, {"error": f"its trial died {RESTARTS + 1} times"})

    def _end(self, trial, result: dict) -> None:
        self.tell()
        key = tuple(trial.config["setting"].values())
        self.ends[key] = result
        self._on_event({"event": "trial", "key": key, **result})


def run_trials(
    chains: Mapping[Key, Sequence[Task]],
    maker: Maker,
    folder: Path,
    log: Path,
    on_event: Callable[[dict], None],
    loggers: Sequence[str] = (),
    sampled: Sampled | None = None,
) -> dict[Key, dict]:
    """Make every setting's stages, or those of the settings that Optuna suggests; return the last stages' reports.

    A report is {"error": the reason} where a stage failed. Keys are the settings' values, in the same order for all.
    folder: Tune's output, in a subfolder for every start; all starts share MLflow's store. log: one JSON line is
    appended for every stage that was made or failed. on_event: called with {"event": "started" | "made" | "failed",
    "name", ...} for stages and {"event": "trial", "key", ...} for trials.
    """
    _quiet()
    folder.mkdir(parents=True, exist_ok=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    logger_callbacks = _loggers(loggers, folder)
    broker = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_Broker).remote(maker, str(log))
    watch = _Watch(broker, on_event)
    trainable = tune.with_parameters(_coordinate, broker=broker, chains=dict(chains))
    space, settings = _space(list(chains), maker.parallel, sampled)
    tuner = tune.Tuner(
        tune.with_resources(trainable, tune.PlacementGroupFactory([_ONE_BYTE])),
        param_space=space,
        tune_config=settings,
        run_config=tune.RunConfig(
            name=f"start-{1 + len(list(folder.glob('start-*')))}",
            storage_path=str(folder.resolve()),
            failure_config=tune.FailureConfig(max_failures=RESTARTS),
            callbacks=[watch, *logger_callbacks],
            verbose=0,
        ),
    )
    try:
        tuner.fit()
        watch.tell()
    finally:
        ray.kill(broker)  # and with it the workers, which it owns
    return watch.ends


def _space(keys: list[Key], parallel: int, sampled: Sampled | None) -> tuple[dict, Any]:
    """Return Tune's parameter space and its settings: a grid over the keys, or what Optuna suggests of them."""
    if sampled is None:
        grid = [{str(place): value for place, value in enumerate(key)} for key in keys]
        most = TRIALS_PER_STAGE * parallel
        return {"setting": tune.grid_search(grid)}, tune.TuneConfig(max_concurrent_trials=most)
    import optuna

    from cluster.suggesting import Suggestions

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    searcher = Suggestions(keys, sampled.objectives, sampled.trials, sampled.batch, sampled.seed)
    return {}, tune.TuneConfig(search_alg=searcher, num_samples=sampled.trials)


def _loggers(names: Sequence[str], folder: Path) -> list:
    callbacks: list = []
    if "tensorboard" in names:
        from ray.tune.logger import TBXLoggerCallback

        callbacks.append(TBXLoggerCallback())
    if "mlflow" in names:
        if importlib.util.find_spec("mlflow") is None:
            raise ValueError("The logger mlflow is not installed: pip install mlflow-skinny, or leave it out.")
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
        from ray.air.integrations.mlflow import MLflowLoggerCallback

        store = f"sqlite:///{folder.resolve()}/mlflow.db"
        callbacks.append(MLflowLoggerCallback(store, experiment_name=folder.name))
    return callbacks


def _quiet() -> None:
    """Leave Ctrl-C and the choice of loggers to the job; allow failed settings to report no numbers."""
    switches = ("DISABLE_AUTO_CALLBACK_LOGGERS", "DISABLE_SIGINT_HANDLER", "DISABLE_STRICT_METRIC_CHECKING")
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # trials that died are reported as rows, not as tracebacks
    os.environ |= {"RAY_AIR_NEW_OUTPUT": "0", **{f"TUNE_{switch}": "1" for switch in switches}}
