"""Find the best model for a budget of memory and time: Ray Tune over depth x width x recovery x quantizer x bits.

    python -m jobs.search --config configs/derm-tiny-search.yaml
    python -m jobs.search --config configs/derm-tiny-search.yaml --resume
    python -m jobs.search --config configs/derm-tiny-search.yaml --resolve-only --search.budget.ms_per_token 5
    ray job submit --working-dir . -- python -m jobs.search --config configs/llava-1.5-7b-dermnet.yaml \\
        --data.root /shared/dermnet --run_dir /shared/runs/dermnet --search.budget.memory_gib 4

Settings share stages, and every stage is made once. A setting whose estimated memory is over the budget is listed, not
run. If more than search.max_trials settings remain, Optuna suggests that many of them, each once.
With search.screen_images the search first evaluates every setting on a part of the test images. Dominated settings stop
there: another one scores better with the same kernels, no fewer layers removed and no more memory. The other settings
are evaluated on all test images, and judged if judge.engine is set. A setting that fails is a row with its reason.

The memory of a row is the peak that the GPU's driver reports (of several GPUs: of the fullest one). On a CPU a process
is mostly interpreter, so the memory is the estimate. There a checkpoint of jobs.joint is counted packed but timed
unpacked, so it is never the answer to a limit of time. The search writes its rows to run_dir/search/rows.json, its
report to run_dir/search/report.html, and the times of its stages to run_dir/search/log.jsonl. Checkpoints of jobs.joint
and rows of earlier searches in the same run_dir take part. After any stop the same command continues; finished stages
are not made again. --resolve-only answers for another budget from the rows.
"""

import logging
import os
import time
from collections.abc import Sequence
from typing import get_args

from jobs import judge
from jobs.core.command import main
from jobs.core.facts import EvaluateFacts
from jobs.core.logs import current_flags
from jobs.core.progress import Progress
from jobs.core.run import Run
from jobs.core.stage import Stage
from jobs.core.text import align
from jobs.judging.asking import check_judge
from jobs.judging.tables import flag
from jobs.reporting import card
from jobs.reporting.search import write_report
from jobs.searching import budget
from jobs.searching.log import EVENTS
from jobs.searching.rows import answers, estimates, read_rows, rows_of, totals, write_rows
from jobs.searching.space import Setting, space
from jobs.searching.stages import SEARCH, Plan, plans
from jobs.searching.table import Cost, SearchRow

LOG = logging.getLogger("jobs")

OBJECTIVES = {"score": "max", "memory_gib": "min", "ms_per_token": "min"}
Key = tuple[str, ...]


class SettingSearch:
    """A search in progress: its plans, failures and dominated settings."""

    def __init__(self, run: Run):
        self.run = run
        self.settings = space(run.config)
        self.plans = plans(run, self.settings)
        if run.config.judge.engine != "none":
            check_judge(run)  # a judge that cannot start fails now, not after hours
        self.sizes = estimates(run, self.plans)
        limit = run.config.search.budget.memory_gib
        within = [limit is None or size <= limit for size in self.sizes]
        self.within = [plan for plan, small in zip(self.plans, within, strict=True) if small]
        self.open = self.within
        self.sampled = len(self.open) > run.config.search.max_trials
        if self.sampled and run.config.search.screen_images is None:
            raise ValueError(
                f"{len(self.open)} settings are to be tried, more than search.max_trials "
                f"({run.config.search.max_trials}): Optuna needs a cheap score to choose from them, so set "
                "search.screen_images, or raise search.max_trials."
            )
        self.failures: dict[Key, str] = {}
        self.dominated: dict[Key, dict] = {}

    def rows(self) -> list[SearchRow]:
        """Return the table as it is now."""
        rows = rows_of(self.run, self.plans, self.sizes, self.failures, self.dominated)
        return [row for row in rows if row["status"] != "open" or row["screen_pct"] is not None or not self.sampled]

    def build(self) -> None:
        """Make the checkpoints and their screening evaluations: of all settings, or those that Optuna suggests."""
        work = {plan.setting.key: (plan, plan.first) for plan in self.open}
        self._rung("screen" if self._screens else "build", work, parallel=_count_makers(self.run), sampled=self.sampled)

    def narrow(self) -> None:
        """Screen and evaluate; again after a failure, since a failed setting no longer dominates others."""
        failed = None
        while failed != len(self.failures):
            failed = len(self.failures)
            if self._screens:
                self.screen()
            self.evaluate()

    def screen(self) -> None:
        """Compare the screening evaluations, and record which settings are dominated."""
        left = [plan for plan in self.within if plan.setting.key not in self.failures]
        screened = [plan for plan in left if plan.screen and self.run.store.find(plan.screen.name)]
        size = {plan.setting.key: size for plan, size in zip(self.plans, self.sizes, strict=True)}
        tables = {plan.setting.key: answers(self.run, plan.screen.name) for plan in screened if plan.screen}
        groups = {sample: row["group"] for table in tables.values() for sample, row in table.items()}
        entrants = [
            budget.Entrant(p.setting, size[p.setting.key], {s: r["baseline"] for s, r in tables[p.setting.key].items()})
            for p in screened
        ]
        self.dominated = budget.find_dominated(entrants, groups)
        self.open = [plan for plan in screened if plan.setting.key not in self.dominated]
        LOG.info(
            f"search: {len(self.dominated)} of {len(screened)} settings are dominated in screening, "
            f"{len(self.open)} continue"
        )

    def evaluate(self) -> None:
        """Evaluate the remaining settings on all images; on a CPU one at a time, so that timing is undisturbed."""
        left = [plan for plan in self.open if plan.setting.key not in self.failures]
        work = {plan.setting.key: (plan, [plan.evaluation]) for plan in left}
        wanted = self.run.config.replicas
        self._rung("evaluate", work, parallel=_count_makers(self.run) if wanted.gpus >= 1 else 1)

    def judge(self) -> Exception | None:
        """Judge all evaluated settings, earlier ones too, in one session; return the error that ended it."""
        done = [plan.evaluation for plan in self.plans if self.run.store.find(plan.evaluation.name)]
        return judge.judge_or_error(self.run, done) if self.run.config.judge.engine != "none" and done else None

    @property
    def _screens(self) -> bool:
        return self.run.config.search.screen_images is not None

    def _rung(self, name: str, work: dict[Key, tuple[Plan, list[Stage]]], parallel: int, sampled: bool = False) -> None:
        """Make every setting's missing stages, as trials of Ray Tune."""
        missing = {key: self.run.missing(stages) for key, (_, stages) in work.items()}
        waiting = [key for key, stages in missing.items() if stages]
        LOG.info(f"search: {name}, {len(work) - len(waiting)} of {len(work)} settings have theirs already")
        if not waiting:
            return
        from cluster.tuning import Maker, Sampled, Task, run_trials

        size = {plan.setting.key: size for plan, size in zip(self.plans, self.sizes, strict=True)}

        def task(plan: Plan, stage: Stage) -> Task:
            fields = {name: getattr(plan.setting, name) for name in Setting.__dataclass_fields__}
            return Task(stage.name, (fields, parallel > 1, {"memory_gib": size[plan.setting.key]}))

        chosen = list(work) if sampled else waiting  # Optuna gets finished trials again, to suggest the same
        chains = {key: [task(work[key][0], s) for s in missing[key] or work[key][1][-1:]] for key in chosen}
        config = self.run.config
        trials = Sampled(config.search.max_trials, OBJECTIVES, config.seed) if sampled else None
        self.run.sources.fingerprints.save()  # so that the makers of stages need not read the weights again
        kwargs = {
            "config": self.run.resolved().model_dump(mode="json"),
            "command": card.command(),
            "address": os.environ.get("RAY_ADDRESS"),
            "flags": current_flags(),
        }
        maker = Maker("jobs.searching.stages:StageMaker", kwargs, parallel)
        folder = self.run.folder / SEARCH
        with Progress(f"search: {name}", trials.trials if trials else len(waiting)) as progress:
            finished = {key: stages[-1] for key, (_, stages) in work.items() if stages and not missing[key]}
            listener = _TrialListener(self, progress, finished)
            ends = run_trials(chains, maker, folder / name, folder / EVENTS, listener, config.search.loggers, trials)
        self.failures |= {key: end["error"] for key, end in ends.items() if end.get("error")}


class _TrialListener:
    """Logs each event in one line, and keeps the table up to date."""

    def __init__(self, search: SettingSearch, progress: Progress, finished: dict[Key, Stage]):
        self._search, self._progress = search, progress
        self._labels = {setting.key: setting.label for setting in search.settings}
        self._best: tuple[float, str] | None = None
        for key, stage in finished.items():
            if stage.kind == "evaluate":
                self._note_score(search.run.facts(stage, EvaluateFacts)["metrics"]["baseline_pct"], key)

    def __call__(self, event: dict) -> None:
        if event["event"] == "started":
            LOG.info(f"search: making {event['name']}")
        elif event["event"] == "made":
            LOG.info(f"search: made {event['name']} in {event['seconds']:.0f} s")
        elif event["event"] == "failed":
            LOG.warning(f"search: {event['name']} failed: {event['error']}")
        else:
            self._trial(event)

    def _trial(self, event: dict) -> None:
        label, error = self._labels[event["key"]], event.get("error")
        if error:
            self._search.failures[event["key"]] = error
        elif "score" in event:
            self._note_score(event["score"], event["key"])
        best = f"{label} {'failed' if error else 'done'}" + (
            f"; best {self._best[0]:.1f}, {self._best[1]}" if self._best else ""
        )
        self._progress.step(best)
        write_rows(self._search.run, self._search.rows())

    def _note_score(self, score: float, key: Key) -> None:
        if self._best is None or score > self._best[0]:
            self._best = score, self._labels[key]


def _count_makers(run: Run) -> int:
    """Return how many stages are made at a time: replicas.count, or, if auto, as many workers as fit."""
    from cluster.connection import room

    run.workers.connect()
    wanted = run.config.replicas
    return (
        wanted.count if wanted.count != "auto" else max(1, room(wanted.cpus, max(1, wanted.gpus) if wanted.gpus else 0))
    )


def format_rows(rows: Sequence[SearchRow], failure: Exception | None = None) -> str:
    """Return the rows as a table for a terminal; failure: the error that ended the judge."""
    fronts = [{row["setting"] for row in budget.pareto_front(rows, cost)} for cost in get_args(Cost)]
    lines = [["setting", "status", "score", "95 %", "params M", "GiB", "", "ms/token", "", "s alone"]]
    for row in rows:
        kind = " (simulated)" if row["simulated"] else " (unpacked)" if row["unpacked"] else ""
        cells = [row["setting"] + kind, row["status"], "", "", "", f"{row['estimate_gib']:.4g}", "", "", "", ""]
        if row["status"] == "done":
            marks = ["*" if row["setting"] in front else "" for front in fronts]
            cells[2:5] = ["-", "", f"{row['params'] / 1e6:.3f}"]
            if row["score_pct"] is not None:
                low, high = row["score_interval_pct"]
                cells[2:4] = [f"{row['score_pct']:.1f}", f"[{low:.0f}, {high:.0f}]{flag(row)}"]
            cells[5:7] = [f"{row['memory_gib']:.4g}", marks[0]]
            cells[7:] = [f"{row['ms_per_token']:.2f}", marks[1], f"{row['seconds_alone']:.0f}"]
        lines.append(cells)
    text = align(lines, left=2)
    for row in [row for row in rows if row["status"] == "done"][:1]:
        kind = {"judge": "LLM judge", "baseline": "baseline score"}[row["score_kind"]]
        kind += "" if any(other["is_llm_judge"] for other in rows) or failure else ", LLM judge: not run"
        text.append(
            f"{row['images']} test images; {kind}; {row['device']}, {row['threads']} thread(s); memory: "
            f"{row['memory_kind']}; *: on the Pareto front"
        )
    text += budget.judge_lines({row["setting"]: row for row in rows}, failure)
    if any(row["simulated"] for row in rows):
        text.append("simulated: stored in 16 bits, but counted at the nominal bits; never the answer")
    if any(row["unpacked"] for row in rows):
        text.append("unpacked: transformers unpacks the weights when it loads them; ms/token is that of 16-bit weights")
    explained = [row for row in rows if row["status"] in ("failed", "screened out")]
    return "\n".join(text + [f"{row['setting']} {row['status']}: {row['reason']}" for row in explained])


def job(run: Run) -> None:
    """Search, or only resolve the budget again; print the table and the answer."""
    config, recorded, failure = run.config.search, read_rows(run), None
    if (config.resume or config.resolve_only) and not recorded:
        raise ValueError(f"There is no search in run_dir {str(run.folder)!r}: give the run_dir of one, or start it.")
    if not config.resolve_only:
        new_rows, failure = run_search(run)
        recorded = read_rows(run)  # those of jobs.joint are among them
    resolved = budget.resolve(recorded, config.budget, lambda best, second: budget.compare_rows(run, best, second))
    print(format_rows(recorded, failure))
    print(budget.format_answer(resolved, config.budget), flush=True)
    LOG.info(f"search: the report is {write_report(run, recorded, resolved, failure)}")
    if not config.resolve_only:
        check_any(new_rows)
    if failure is not None:
        raise failure


def check_any(rows: Sequence[SearchRow]) -> None:
    """RuntimeError if settings were tried, and all of them failed."""
    failed = [row for row in rows if row["status"] == "failed"]
    if failed and not any(row["status"] == "done" for row in rows):
        raise RuntimeError(f"All {len(failed)} settings that were tried failed; the first: {failed[0]['reason']}")


def run_search(run: Run) -> tuple[list[SearchRow], Exception | None]:
    """Make what is missing and write the rows; return them, and the error that ended the judge."""
    started = time.monotonic()
    search = SettingSearch(run)
    path = write_rows(run, search.rows())
    LOG.info(
        f"search: {len(search.plans)} settings, {len(search.plans) - len(search.open)} over budget; rows are in {path}",
    )
    search.build()
    search.narrow()
    failure = search.judge()
    rows = search.rows()
    write_rows(run, rows)
    for plan in search.plans:
        if run.store.find(plan.evaluation.name):
            judge.refresh_card(run, plan.model, plan.evaluation)
    sums = totals(run, rows)
    LOG.info(
        f"search: took {time.monotonic() - started:.0f} s now. All {sums['stages']} stages took "
        f"{sums['seconds']:.0f} s; without sharing they would take {sums['seconds_apart']:.0f} s, not counting the "
        "evaluations that screening saved"
    )
    return rows, failure


if __name__ == "__main__":
    options = {"resume": "search.resume", "resolve-only": "search.resolve_only"}
    main(__doc__, job, options, records=lambda config: not config.search.resolve_only)
