"""The stages of a setting, which other settings share, and the worker that makes a stage."""

import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

from jobs import ablate, evaluate, prepare, prune, quantize, recover
from jobs.config.schema import Config
from jobs.core.facts import EvaluateFacts
from jobs.core.logs import into_file
from jobs.core.run import Run
from jobs.core.stage import Source, Stage
from jobs.ranking import select
from jobs.searching.space import Setting, config_of

SEARCH = "search"  # folder of a run for what the search writes


@dataclass(frozen=True)
class Plan:
    """A setting's checkpoint and evaluations. before: searches of other settings that its own stages reuse."""

    setting: Setting
    model: Stage | Source
    screen: Stage | None
    evaluation: Stage
    before: tuple[Stage, ...]

    @property
    def chain(self) -> list[Stage]:
        """All stages of the setting, parents first, the evaluation last; not the screen."""
        return order_stages([self.evaluation])

    @property
    def first(self) -> list[Stage]:
        """What the first rung makes: the checkpoint and, if there is one, the screen."""
        return order_stages([*self.before, self.screen or self.model])

    def find(self, name: str) -> Stage:
        """Return the stage of that name; ValueError: none has it: data, model or options changed."""
        for stage in order_stages([*self.first, self.evaluation]):
            if stage.name == name:
                return stage
        raise ValueError(
            f"{name} is not a stage of {self.setting.label!r} any more: its data, model or options changed while the "
            "search ran. Start the search again."
        )


def order_stages(stages: Iterable[Stage | Source]) -> list[Stage]:
    """Return stages and all that they are made from, parents first, each once."""
    ordered: dict[str, Stage] = {}

    def visit(stage: Stage | Source) -> None:
        if isinstance(stage, Source) or stage.name in ordered:
            return
        for parent in stage.parents:
            visit(parent)
        ordered[stage.name] = stage

    for stage in stages:
        visit(stage)
    return list(ordered.values())


def plans(run: Run, settings: Iterable[Setting]) -> list[Plan]:
    """Plan settings; ValueError: one of them is impossible, as far as config.json tells."""
    data, base = prepare.stage(run), run.base_model()
    pruned: dict[tuple[int, float], Stage | Source] = {}
    recovered: dict[tuple[int, float, str], Stage | Source] = {}
    planned = []
    for setting in settings:
        setting_run = Run(config_of(run.config, setting), parent_run=run)
        shape = setting.depth, setting.width
        model = pruned[shape] = pruned.get(shape) or prune.stage(setting_run, base)
        if setting.recovery != "none":
            key = *shape, setting.recovery
            recovered[key] = recovered.get(key) or recover.stage(setting_run, model, data)
            model = recovered[key]
        model = quantize.stage(setting_run, model, data)
        screen = None
        if run.config.search.screen_images is not None:
            cheap = Run(config_of(run.config, setting, screen=True), parent_run=run)
            screen = evaluate.stage(cheap, model, data)
        planned.append(
            Plan(setting, model, screen, evaluate.stage(setting_run, model, data), _before(run, setting, data, base))
        )
    return planned


def _before(run: Run, setting: Setting, data: Stage, base: Source) -> tuple[Stage, ...]:
    """Return the searches for smaller sets: greedy and beam search pass through them, and reuse their measurements."""
    if run.config.prune.order is not None or run.config.prune.search not in ("greedy", "beam"):
        return ()
    searched = {depth for grid in run.config.search.grids for depth in grid.depths}
    smaller = [depth for depth in sorted(searched) if 0 < depth < setting.depth]
    scores = ablate.stage(run, base, data)
    depths = [
        run.config.model_copy(update={"prune": run.config.prune.model_copy(update={"layers": d})}) for d in smaller
    ]
    return tuple(select.stage(Run(config, parent_run=run), base, data, scores) for config in depths)


class StageMaker:
    """Makes one stage of one setting at a time, in a process that several stages share one after another."""

    def __init__(self, config: dict, command: str, address: str | None, flags: dict[str, bool]):
        if address:  # a worker lacks it, and would take the cluster for a private Ray
            os.environ["RAY_ADDRESS"] = address
        self._parent_run = Run(Config.model_validate(config), command=command)
        self._flags = flags

    def make(self, name: str, setting: Mapping, one_replica: bool, report: Mapping[str, float]) -> dict:
        """Make the stage of that name, unless it exists; returns {made, pid, numbers of an evaluation, report}.

        one_replica: others are evaluated beside it. The stage's log goes to run_dir/search/logs.
        """
        (plan,) = plans(self._parent_run, [Setting(**setting)])
        stage = plan.find(name)
        config = config_of(self._parent_run.config, plan.setting, screen=stage == plan.screen)
        if one_replica and stage.kind == "evaluate" and config.replicas.count == "auto":
            config = config.model_copy(update={"replicas": config.replicas.model_copy(update={"count": 1})})
        logs = self._parent_run.folder / SEARCH / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            run = stack.enter_context(Run(config, parent_run=self._parent_run, beside_others=one_replica))
            stack.enter_context(into_file(logs / f"{name}.txt", self._flags))
            is_new = run.store.find(name) is None
            run.make(stage)
        result = {"made": is_new, "pid": os.getpid(), **report}
        if stage.kind == "evaluate":
            facts = run.facts(stage, EvaluateFacts)
            result |= {"score": facts["metrics"]["baseline_pct"], "ms_per_token": facts["profile"]["ms_per_token"]}
        return result
