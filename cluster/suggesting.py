"""The settings of a space that Optuna suggests: only existing ones, each once, and the same ones after a resume."""

from collections.abc import Iterable, Mapping

import optuna

from cluster.connection import protect

protect()
from ray.tune.search import Searcher  # noqa: E402

ASKS = 8  # suggestions that do not exist or were made before, after which the nearest remaining setting is taken
Key = tuple[str, ...]


class Suggestions(Searcher):
    """Suggests at most `trials` of `keys`, `batch` at a time; each batch uses the results of those before it.

    objectives: columns that a trial reports, to maximise or minimise: {"score": "max", "memory": "min"}. A setting that
    does not exist, or that failed, counts as the worst result so far, so that others are suggested.
    """

    def __init__(self, keys: Iterable[Key], objectives: Mapping[str, str], trials: int, batch: int, seed: int):
        super().__init__()
        self._left = dict.fromkeys(keys)
        columns = [list(dict.fromkeys(column)) for column in zip(*self._left, strict=True)]
        self._space: dict[str, optuna.distributions.BaseDistribution] = {
            str(n): optuna.distributions.CategoricalDistribution(v) for n, v in enumerate(columns)
        }
        self._names, self._worse = list(objectives), [min if way == "max" else max for way in objectives.values()]
        self._study = optuna.create_study(
            directions=["maximize" if way == "max" else "minimize" for way in objectives.values()],
            sampler=optuna.samplers.TPESampler(seed=seed),
        )
        self._remaining, self._batch = min(trials, len(self._left)), batch
        self._running: dict[str, tuple[optuna.trial.Trial, Key]] = {}  # of this batch, in the order of suggestion
        self._ends: dict[str, list[float] | None] = {}
        self._scores: dict[Key, list[float]] = {}

    def suggest(self, trial_id: str) -> dict | str | None:
        """Return {"setting": {"0": value, ...}}, None (wait for the batch to end) or FINISHED."""
        if not self._remaining:
            return Searcher.FINISHED
        if len(self._running) == self._batch:
            if len(self._ends) < self._batch:
                return None
            self._learn()
        trial, key = self._ask_optuna()
        del self._left[key]
        self._remaining -= 1
        self._running[trial_id] = trial, key
        return {"setting": {str(place): value for place, value in enumerate(key)}}

    def on_trial_result(self, trial_id: str, result: dict) -> None:
        """Trials report once, at their end."""

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        """Record a trial's result; Optuna gets it when its batch has ended."""
        scores = result or {}
        whole = not error and all(scores.get(name) is not None for name in self._names)
        self._ends[trial_id] = [float(scores[name]) for name in self._names] if whole else None

    def save(self, checkpoint_path: str) -> None:
        """Write nothing: a resumed search gets the finished trials again."""

    def _learn(self) -> None:
        for trial_id, (_, key) in self._running.items():
            if (values := self._ends[trial_id]) is not None:
                self._scores[key] = values
        for trial_id, (trial, _) in self._running.items():
            self._tell(trial, self._ends[trial_id])
        self._running.clear()
        self._ends.clear()

    def _ask_optuna(self) -> tuple[optuna.trial.Trial, Key]:
        """Return a trial of Optuna's and its setting, one of those not yet suggested."""
        busy = {key for _, key in self._running.values()}
        for _ in range(ASKS):
            trial = self._study.ask(self._space)
            key = tuple(str(trial.params[place]) for place in self._space)
            if key in self._left:
                return trial, key
            if key in busy:  # its result is not known yet
                self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
            else:
                self._tell(trial, self._scores.get(key))
        near = min(self._left, key=lambda key_left: sum(a != b for a, b in zip(key_left, key, strict=True)))
        self._study.enqueue_trial({str(place): value for place, value in enumerate(near)})
        return self._study.ask(self._space), near

    def _tell(self, trial: optuna.trial.Trial, values: list[float] | None) -> None:
        if values is None and self._scores:
            columns = zip(*self._scores.values(), strict=True)
            values = [worse(column) for worse, column in zip(self._worse, columns, strict=True)]
        if values is None:
            self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            self._study.tell(trial, values)
