"""Settings whose stages are files that cost nothing, made without Ray Tune."""

import cluster.tuning
from cluster.tables import write_table
from jobs import evaluate, search
from jobs.allocation import build as joint_build
from jobs.config.schema import Config
from jobs.core.options import load_config
from jobs.core.run import Run
from jobs.core.stage import Source, Stage
from jobs.searching.rows import MEASURED
from jobs.searching.space import Setting, space
from jobs.searching.stages import Plan

SPACE = {
    "search.depths": "[0, 2]",
    "search.recoveries": "[none, lora]",
    "search.quantizers": "[none, awq]",
    "search.screen_images": "12",
}
GOOD = {"none": 0.5, "lora": 1.0}  # what is not fine-tuned answers every other image rightly
GIB = {"none": 4.0, "awq": 1.0}


class Stopped(BaseException):
    """What a kill does to the driver."""


def plain_answers(label: str, images: int, share: float) -> list[dict]:
    """One answer to each image, of which a share is right."""
    return [{"sample_id": f"{i}", "group": f"{i}", "baseline": float(i < share * images)} for i in range(images)]


def plan_of_rows(run: Run, method: str, rows: list[dict] | None) -> Plan:
    """Return the plan of a joint choice that is evaluated with these answers (None: it fails)."""

    def build(own: Run, folder, facts: dict) -> None:
        if rows is None:
            raise RuntimeError("The loss is nan at step 3")
        write_table(folder / evaluate.ANSWERS, rows)
        facts["metrics"] = dict.fromkeys((*joint_build._METRICS, *joint_build._COUNTS), 1)
        facts["profile"] = dict.fromkeys(joint_build._PROFILE, 1)

    model = run.base_model()
    evaluation = Stage("evaluate", 1, {"method": method}, (model,), build)
    return Plan(Setting(0, "lora", "mixed", 0, method), model, None, evaluation, ())


class Factory:
    """Plans settings whose stages are files, and makes them here in place of Ray Tune's trials."""

    def __init__(self, monkeypatch):
        self.made: list[str] = []
        self.broken: tuple[str, ...] = ()  # kinds of stages, or settings whose evaluation on all images fails
        self.stop_after = 10**6
        self.answers = plain_answers
        monkeypatch.setattr(search, "plans", self.plans)
        monkeypatch.setattr(search, "estimates", self.estimates)
        monkeypatch.setattr(search, "_count_makers", lambda run: 2)
        monkeypatch.setattr(cluster.tuning, "run_trials", self.run_trials)

    def plans(self, run: Run, settings: list[Setting]) -> list[Plan]:
        return [self.plan(setting) for setting in settings]

    def plan(self, one: Setting) -> Plan:
        pruned = self.stage("prune", [one.depth], ())
        healed = self.stage("recover", [one.recovery], (pruned,)) if one.recovery != "none" else pruned
        model: Stage | Source = self.stage("quantize", [one.quantizer], (healed,))
        if one.label == "original":
            model = Source("model-1", "here")
        share = 1.0 if one.depth == 0 else GOOD[one.recovery]
        screen, full = (self.stage("evaluate", [images], (model,), share, one.label) for images in (12, 20))
        return Plan(one, model, screen, full, ())

    def stage(self, kind: str, settings: list, parents: tuple, share: float = 0.0, label: str = "") -> Stage:
        def build(run: Run, folder, facts: dict) -> None:
            if kind == "prune":
                facts["removed"] = [1, 2] if settings == [2] else []
            if kind == "evaluate":
                (images,) = settings
                write_table(folder / evaluate.ANSWERS, self.answers(label, images, share))
                facts["metrics"] = dict.fromkeys(("images", "answers"), images) | {"baseline_pct": 100 * share}
                facts["metrics"] |= {"baseline_interval_pct": [100 * share - 5, 100.0], "unanswered": 0}
                facts["metrics"] |= dict.fromkeys(("exact_pct", "name_accuracy", "name_accuracy_interval"), None)
                facts["profile"] = {"params": 10, "weight_bytes": 20, "device": "CPU", "threads": 1}
                facts["profile"] |= {"ms_per_token": 3.0, "ms_per_token_p5_p95": [2.0, 4.0], "first_token_ms": 9.0}
                facts["profile"] |= {"steady_peak_bytes": {"resident": 1}, "peak_memory_bytes": 2**30}

        return Stage(kind, 1, {"settings": settings}, parents, build)

    def estimates(self, run: Run, plans: list[Plan]) -> list[float]:
        return [GIB[plan.setting.quantizer] - 0.1 * plan.setting.depth for plan in plans]

    def run_trials(self, chains, maker, folder, log, on_event, loggers, sampled) -> dict:
        run = Run(Config.model_validate(maker.kwargs["config"]))
        assert (run.folder / "artifacts" / "fingerprints.json").is_file()  # so that no maker reads the weights again
        ends = {}
        for key, tasks in chains.items():
            plan = next(self.plan(one) for one in space(run.config) if one.key == key)
            ends[key] = {"error": None}
            for task in tasks:
                stage = plan.find(task.name)
                if run.store.find(stage.name) is None:
                    last = [plan.setting.label] if stage.name == plan.evaluation.name else []
                    if {stage.kind, *last} & {*self.broken}:
                        ends[key] = {"error": "The loss is nan at step 3"}
                        break
                    if len(self.made) >= self.stop_after:
                        raise Stopped
                    run.make(stage)
                    self.made.append(stage.name)
            on_event({"event": "trial", "key": key, "score": 50.0, **ends[key]})
        return ends


def new_run(folder, **options: str) -> Run:
    given = {"run_dir": str(folder), **SPACE, **{key.replace("__", "."): value for key, value in options.items()}}
    return Run(load_config(None, list(given.items())))


def names(rows: list[dict], status: str) -> list[str]:
    return [row["setting"] for row in rows if row["status"] == status]


def comparable(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key not in (*MEASURED, "command")} for row in rows]
