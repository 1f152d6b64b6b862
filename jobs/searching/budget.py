"""Which setting to use: what is dominated in screening, the Pareto front, and the best setting within a budget."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from actors.judge.verdict import TOP_LABEL
from actors.maths.fronts import find_undominated
from jobs.config.search import BudgetConfig
from jobs.core.run import Run
from jobs.judging import text as judge_text
from jobs.judging.rows import VERDICTS
from jobs.judging.tables import by_baseline, flag, remarks
from jobs.scoring.differences import differences
from jobs.searching.rows import answers
from jobs.searching.space import Setting
from jobs.searching.table import Cost, SearchRow

Scores = Mapping[str, float | None]  # sample_id -> 0 to 1, or a judge's label
CPU = "CPU"  # what actors.profiler calls the device there
LIMITS: tuple[tuple[Cost, str], ...] = (("memory_gib", "GiB"), ("ms_per_token", "ms/token"))


@dataclass(frozen=True)
class Entrant:
    """A setting in screening: its estimated memory, and its score of every question."""

    setting: Setting
    estimate_gib: float
    scores: Scores

    def takes_no_more(self, other: "Entrant") -> bool:
        """Tell whether this one surely takes neither more memory nor more time than the other, without timing them.

        A simulated setting takes more than it counts, so it cannot dominate one that can be used.
        """
        mine, theirs = self.setting, other.setting
        if mine.simulated and not theirs.simulated:
            return False
        no_slower = mine.kernels == theirs.kernels and mine.depth >= theirs.depth and mine.width <= theirs.width
        return no_slower and self.estimate_gib <= other.estimate_gib


def find_dominated(entrants: Sequence[Entrant], groups: Mapping[str, int | str]) -> dict[tuple[str, ...], dict]:
    """Return the dominated settings by key: by which one, and by how many points with their interval.

    A setting is dominated if another one takes no more and its answers are better, by the paired interval over images
    and Holm's p value over those that it is compared with. groups: sample_id -> image or series.
    """
    dominated = {}
    for entrant in entrants:
        rivals = [other for other in entrants if other is not entrant and other.takes_no_more(entrant)]
        rows = differences([entrant.scores, *(rival.scores for rival in rivals)], groups, 1.0)[1:]
        better = [(row["difference_pct"], rival, row) for rival, row in zip(rivals, rows, strict=True)]
        better = [each for each in better if each[2]["difference_finding"] == "better"]
        if better:
            points, rival, row = max(better, key=lambda each: each[0])
            low, high = row["difference_interval_pct"]
            dominated[entrant.setting.key] = {"to": rival.setting.label, "pct": points, "low": low, "high": high}
    return dominated


def usable(row: SearchRow, timed: bool = False) -> bool:
    """Tell whether a row was evaluated and scored like the others, and is not only simulated.

    timed: whether its ms/token counts, too; that of unpacked weights does not go with the memory of packed ones.
    """
    comparable = row["status"] == "done" and row["score_pct"] is not None and not row["simulated"]
    return comparable and not (timed and timed_apart(row))


def timed_apart(row: SearchRow) -> bool:
    """Tell whether a row has the estimated memory of packed weights, and the time of unpacked ones, as on a CPU.

    On a GPU both are measured, of the unpacked weights.
    """
    return row["unpacked"] and row["device"] == CPU


def pareto_front(rows: Iterable[SearchRow], cost: Cost) -> list[SearchRow]:
    """Return the usable rows that none dominates by score and cost, cheapest first."""
    usable_rows = [row for row in rows if usable(row, timed=cost == "ms_per_token")]
    costs, scores = [row[cost] for row in usable_rows], [row["score_pct"] for row in usable_rows]
    return [usable_rows[place] for place in find_undominated(costs, scores)]


def within_budget(row: SearchRow, budget: BudgetConfig) -> bool:
    """Tell whether a row can be used and stays within the budget."""
    if not usable(row, timed=budget.ms_per_token is not None):
        return False
    limits = [(name, getattr(budget, name)) for name, _ in LIMITS]
    return all(limit is None or row[name] <= limit for name, limit in limits)


def resolve(rows: Sequence[SearchRow], budget: BudgetConfig, compare: Callable[[SearchRow, SearchRow], dict]) -> dict:
    """Return {answer, runner_up, margins, difference, nearest, untried, ...} for a budget, from recorded rows alone.

    Of equal scores the one with less memory wins, then the faster. margins: what the answer leaves of each
    limit, in its unit. difference: `compare(answer, runner_up)`. untried: settings that were over an older budget and
    whose estimate fits this one. nearest: without an answer, the row that misses the budget by the smallest factor.
    open: settings that are not finished. unjudged: evaluated ones without the judge's score that the others have.
    untimed: joint choices that are counted packed but timed unpacked, if time is limited.
    """
    allowed = [row for row in rows if within_budget(row, budget)]
    allowed.sort(key=lambda row: (-row["score_pct"], row["memory_gib"], row["ms_per_token"], row["setting"]))
    distinct: dict[str, SearchRow] = {}  # jobs.joint may have made what the search made, under another name
    for row in allowed:
        distinct.setdefault(row["evaluation"], row)
    allowed = list(distinct.values())
    memory = budget.memory_gib
    untried = [
        r["setting"] for r in rows if r["status"] == "over budget" and (memory is None or r["estimate_gib"] <= memory)
    ]
    resolved: dict = {
        "answer": None,
        "runner_up": None,
        "margins": {},
        "difference": None,
        "untried": untried,
        "nearest": None,
        "open": sum(row["status"] == "open" for row in rows),
        "unjudged": sum(row["status"] == "done" and row["score_pct"] is None for row in rows),
        "untimed": sum(usable(row) and not usable(row, timed=budget.ms_per_token is not None) for row in rows),
    }
    if not allowed:
        near = [row for row in rows if usable(row, timed=budget.ms_per_token is not None)]
        return {**resolved, "nearest": min(near, key=lambda row: _excess(row, budget), default=None)}
    best, second = allowed[0], allowed[1] if len(allowed) > 1 else None
    limits: dict[Cost, float | None] = {name: getattr(budget, name) for name, _ in LIMITS}
    margins = {name: limit - best[name] for name, limit in limits.items() if limit is not None}
    difference = compare(best, second) if second else None
    return {**resolved, "answer": best, "runner_up": second, "margins": margins, "difference": difference}


def _excess(row: SearchRow, budget: BudgetConfig) -> float:
    limits: dict[Cost, float | None] = {name: getattr(budget, name) for name, _ in LIMITS}
    return max((row[name] / limit for name, limit in limits.items() if limit is not None), default=0.0)


def compare_rows(run: Run, best: SearchRow, second: SearchRow) -> dict:
    """Return the columns of jobs.scoring.differences for two evaluated rows: the first against the second."""
    tables = [answers(run, row["evaluation"]) for row in (second, best)]
    groups = {sample: row["group"] for table in tables for sample, row in table.items()}
    if best["score_kind"] == second["score_kind"] == "judge":
        verdicts = [VERDICTS.read(run.store.root / str(row["judgement"])) for row in (second, best)]
        return differences(
            [{v["sample_id"]: v["judge_label"] for v in table} for table in verdicts], groups, TOP_LABEL
        )[1]
    return differences([{s: row["baseline"] for s, row in table.items()} for table in tables], groups, 1.0)[1]


def judge_lines(rows: Mapping[str, Mapping], failure: Exception | None) -> list[str]:
    """Return the judges' table and remarks on rows (by name), for a terminal; [] if none is judged.

    failure: the error that ended the judge.
    """
    judged = {name: row for name, row in rows.items() if row["is_llm_judge"]}
    lines = [judge_text.format_rows(judged), *judge_remarks(rows)] if judged else []
    if failure is not None:
        lines.append(f"LLM judge: FAILED, some answers have no judge score: {failure}")
    return lines


def judge_remarks(rows: Mapping[str, Mapping]) -> list[str]:
    """Return the remarks on the judges that scored the rows (by name): none if none did."""
    judged: dict[str, list[Mapping]] = {}
    for row in rows.values():
        if row["is_llm_judge"]:
            judged.setdefault(row["judge_identity"], []).append(row)
    lines = []
    for rows_of_judge in judged.values():
        scored, total = (sum(row[f"judge_{name}"] for row in rows_of_judge) for name in ("scored", "total"))
        first, *others = remarks(rows_of_judge)
        lines += [f"{first}; {scored} of {total} answers scored, of {len(rows_of_judge)} settings", *others]
    if len(judged) > 1:
        lines.append(
            f"{len(judged)} different judges scored these settings, and their scores do not compare: the baseline's "
            "are used; a search with one judge and all settings scores them all"
        )
    return [*lines, *by_baseline(rows)]


def format_answer(resolved: dict, budget: BudgetConfig) -> str:
    """Put the answer for a budget into sentences."""
    limits = [f"{getattr(budget, name):g} {unit}" for name, unit in LIMITS if getattr(budget, name) is not None]
    wanted = " and ".join(limits) if limits else "no limit"
    lines = []
    best, second = resolved["answer"], resolved["runner_up"]
    if best is None and resolved["nearest"] is None:
        lines.append(f"answer for {wanted}: none, no setting was evaluated")
    elif best is None:
        near = resolved["nearest"]
        lines.append(
            f"answer for {wanted}: none fits; the nearest is {near['setting']}, with {near['memory_gib']:.4g} GiB "
            f"({near['memory_kind']}) and {near['ms_per_token']:.4g} ms/token"
        )
    else:
        lines += [f"answer for {wanted}: {_describe(best)}", f"  checkpoint {best['checkpoint']}"]
        for name, unit in LIMITS:
            if name in resolved["margins"]:
                left = resolved["margins"][name]
                lines.append(f"  leaves {left:.4g} {unit} ({100 * left / (left + best[name]):.0f} %) of the limit")
        lines.append("  no other setting fits" if second is None else f"  runner-up: {_describe(second)}")
        if second is not None:
            lines.append(f"  difference: {_difference(resolved['difference'])}")
    if resolved["untried"]:
        lines.append(
            f"  {len(resolved['untried'])} settings were never tried: they were over an older budget, but fit this "
            "one by their estimate; the search without --resolve-only tries them"
        )
    if resolved["open"]:
        lines.append(
            f"  {resolved['open']} settings are not finished, and may be better: the search with --resume continues"
        )
    if resolved["unjudged"]:
        lines.append(
            f"  {resolved['unjudged']} evaluated settings are left out: the judge has scored others, but not them"
        )
    if resolved["untimed"]:
        lines.append(f"  {resolved['untimed']} joint choices are left out: counted packed, but timed unpacked")
    return "\n".join(lines)


def _describe(row: dict) -> str:
    low, high = row["score_interval_pct"]
    kind = f"LLM judge{', flagged' * bool(flag(row))}" if row["score_kind"] == "judge" else "baseline, no LLM judge"
    return (
        f"{row['setting']}: {row['score_pct']:.1f} [{low:.1f}, {high:.1f}] ({kind}), {row['memory_gib']:.4g} GiB "
        f"({row['memory_kind']}), {row['ms_per_token']:.4g} ms/token"
    )


def _difference(row: dict) -> str:
    if row["difference_finding"] is None:
        return "cannot be computed: the two have no scored answer in common"
    if row["difference_finding"] == "identical":
        return "none, every answer has the same score"
    low, high = row["difference_interval_pct"]
    resolved = "unresolved" if row["difference_finding"] == "unresolved" else "resolved"
    detectable = row["difference_detectable_pct"]
    words = f"{row['difference_pct']:+.1f} points [{low:+.1f}, {high:+.1f}], {resolved} by this evaluation"
    return words + (f", which detects {detectable:.1f}" if detectable is not None else "")
