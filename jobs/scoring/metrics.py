"""What a table of scored answers says about a model: shares and scores in percent, intervals at 95 %.

The unit of every interval is the image: answers about one image, or about near-duplicates, stand or fall together.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from actors.baseline import ClassName, baseline_score, name_given, name_verdict
from actors.judge.verdict import TOP_LABEL
from actors.maths.confusion import confusion, macro_f1, macro_f1_draws
from actors.maths.paired import paired_interval, ratio_interval
from actors.maths.repetition import loop_length
from actors.maths.statistics import (
    cluster_bootstrap_interval,
    cluster_bootstrap_means,
    cluster_share_interval,
    percentile_interval,
)
from jobs.config.schema import ClassConfig

NAME_QUESTION = "name"
UNNAMED = ("none", "multiple", "refused")  # the columns of the confusion matrix behind the classes
GOOD = {  # what is retained; of each, more is better
    "baseline": lambda row: row["baseline"],
    "exact": lambda row: row["answer"] == row["reference"],
    "name_accuracy": lambda row: row["verdict"] == "right",
    "stopped": lambda row: row["stopped"],
    "without_loop": lambda row: row["loop_tokens"] == 0,
}


def scored(rows: list[dict], cosines: Sequence[float], classes: Sequence[ClassConfig]) -> list[dict]:
    """Return the rows with similarity, baseline score, loop and, for the name question, what was named and its verdict.

    cosines: the embedding similarity of every row's answer with its reference.
    """
    kinds = [ClassName(kind.name, tuple(kind.synonyms)) for kind in classes]
    found = []
    for row, cosine in zip(rows, cosines, strict=True):
        answer, truth = row["answer"], row["class"]
        asked = row["question_id"] == NAME_QUESTION
        new = {
            "similarity": cosine,
            "baseline": baseline_score(answer, row["reference"], truth, cosine, kinds),
            "verdict": name_verdict(answer, truth, kinds) if asked else None,
            "named": name_given(answer, kinds)[0] if asked else None,
            "loop_tokens": loop_length(row["token_ids"][: row["tokens"]]),
        }
        found.append({**{key: value for key, value in row.items() if key != "removed"}, **new})
    return found


def metrics(rows: list[dict], classes: Sequence[str]) -> dict:
    """Summarise the scored answers of one model; classes: the names, in the order of the confusion matrix."""
    return {
        "images": len({row["image"] for row in rows}),
        "answers": len(rows),
        **mean("baseline", rows),
        **share("exact", [GOOD["exact"](row) for row in rows], rows),
        **_names([row for row in rows if row["verdict"] is not None], classes),
        "given_name": given_name(rows),
        **share("loop", [row["loop_tokens"] > 0 for row in rows], rows),
        **share("without_stop", [not row["stopped"] for row in rows], rows),
    }


def mean(label: str, rows: list[dict]) -> dict:
    """Return the mean of a column from 0 to 1, and its bootstrap interval, None without rows."""
    if not rows:
        return {f"{label}_pct": None, f"{label}_interval_pct": None}
    values = np.array([row[label] for row in rows], dtype=float)
    low, high = cluster_bootstrap_interval(values, _groups(rows))
    return {f"{label}_pct": 100 * float(values.mean()), f"{label}_interval_pct": [100 * low, 100 * high]}


def share(label: str, hits: Sequence[bool], rows: list[dict]) -> dict:
    """Return the share of rows that are hits, and its interval, None without rows."""
    if not rows:
        return {f"{label}_pct": None, f"{label}_interval_pct": None}
    low, high = cluster_share_interval(np.array(hits), _groups(rows))
    return {f"{label}_pct": 100 * sum(hits) / len(rows), f"{label}_interval_pct": [100 * low, 100 * high]}


def name_accuracy(rows: list[dict]) -> dict:
    """Return the share of answers to the name question that name the right class and no other."""
    asked = [row for row in rows if row["verdict"] is not None]
    found = share("name", [row["verdict"] == "right" for row in asked], asked)
    return {"name_accuracy": found["name_pct"], "name_accuracy_interval": found["name_interval_pct"]}


def _names(rows: list[dict], classes: Sequence[str]) -> dict:
    """Say which diseases were named for which; all None where the name was not asked for."""
    found = {**name_accuracy(rows), "name_verdicts": dict(Counter(row["verdict"] for row in rows))}
    if not rows:
        return {**found, "macro_f1_pct": None, "macro_f1_interval_pct": None, "confusion": None}
    counts = confusion(*_numbered(rows, classes), len(classes), len(classes) + len(UNNAMED))
    value, draws = _macro_f1(rows, classes, _groups(rows))
    return {
        **found,
        "macro_f1_pct": 100 * value,
        "macro_f1_interval_pct": _interval_pct(draws),
        "confusion": {"classes": list(classes), "unnamed": list(UNNAMED), "counts": counts.tolist()},
    }


def by_name(rows: list[dict]) -> dict[str, list[dict]]:
    """Return the answers to other questions, apart for images whose disease was named rightly and for the others."""
    verdicts = {row["image"]: row["verdict"] for row in rows if row["verdict"] is not None}
    parts: dict[str, list[dict]] = {"right": [], "not_right": []}
    for row in rows:
        if row["verdict"] is None and row["image"] in verdicts:
            parts["right" if verdicts[row["image"]] == "right" else "not_right"].append(row)
    return parts


def given_name(rows: list[dict]) -> dict:
    """Return the scores of the parts that `by_name` makes."""
    return {
        part: {
            "images": len({row["image"] for row in own}),
            "answers": len(own),
            **mean("baseline", own),
            **share("exact", [GOOD["exact"](row) for row in own], own),
        }
        for part, own in by_name(rows).items()
    }


def judge_given_name(rows: list[dict], labels: Mapping[str, int | None]) -> dict | None:
    """Return the judge's scores of these parts; labels: by sample_id, from 0 to 4; None without any."""
    if not labels:
        return None
    found = {}
    for part, own in by_name(rows).items():
        known = {row["sample_id"]: label for row in own if (label := labels.get(row["sample_id"])) is not None}
        scored = [{**row, "judge": known[row["sample_id"]] / TOP_LABEL} for row in own if row["sample_id"] in known]
        found[part] = {"images": len({row["image"] for row in scored}), **mean("judge", scored)}
    return found


def retention(original: list[dict], rows: list[dict], classes: Sequence[str]) -> dict[str, dict]:
    """Return what a model retains of the original's metrics, on the questions that both answered (percent).

    The interval is the ratio's, both models having the same draws; None where the original's number is, or can be, 0.
    """
    other = {row["sample_id"]: row for row in original}
    pairs = [(row, other[row["sample_id"]]) for row in rows if row["sample_id"] in other]
    named = [pair for pair in pairs if pair[0]["verdict"] is not None]
    found = {}
    for label, score in GOOD.items():
        if chosen := named if label == "name_accuracy" else pairs:
            own, before = zip(*chosen, strict=True)
            found[label] = retained([score(row) for row in own], [score(row) for row in before], _groups(before))
    if named:
        own, before = zip(*named, strict=True)
        (value, draws), (base, base_draws) = (_macro_f1(side, classes, _groups(before)) for side in (own, before))
        found["macro_f1"] = _ratio(value, base, draws, base_draws)
    return found


def retained(scores: Sequence[float], original: Sequence[float], groups: Sequence | np.ndarray) -> dict:
    """Return the ratio of two models' mean scores on the same questions, and its interval, as `retention` does."""
    values = np.array([scores, original], dtype=float).T
    clusters = np.unique(groups, return_inverse=True)[1]
    return _ratio(*values.mean(axis=0), *cluster_bootstrap_means(values, np.ones_like(values), clusters).T)


def fall(label: str, before: Sequence[float], after: Sequence[float], rows: list[dict]) -> dict:
    """Return how far the mean of a score falls on the same questions, and its interval (points), None without rows."""
    if not rows:
        return {f"{label}_fall_pct": None, f"{label}_fall_interval_pct": None}
    pair = np.array(before, dtype=float), np.array(after, dtype=float)
    low, high = paired_interval(*pair, _groups(rows))
    return {
        f"{label}_fall_pct": 100 * float((pair[0] - pair[1]).mean()),
        f"{label}_fall_interval_pct": [100 * low, 100 * high],
    }


def _macro_f1(rows: Sequence[dict], classes: Sequence[str], groups: np.ndarray) -> tuple[float, np.ndarray]:
    """Return macro F1, and its draws when whole groups are resampled (fractions)."""
    truth, given = _numbered(rows, classes)
    counts = confusion(truth, given, len(classes), len(classes) + len(UNNAMED))
    return macro_f1(counts), macro_f1_draws(truth, given, len(classes), groups)


def _ratio(value: float, original: float, draws: np.ndarray, original_draws: np.ndarray) -> dict:
    bounds = ratio_interval(draws, original_draws)
    return {
        "pct": 100 * float(value / original) if original else None,
        "interval_pct": [100 * bound for bound in bounds] if bounds else None,
    }


def _interval_pct(draws: np.ndarray) -> list[float]:
    low, high = percentile_interval(draws[:, None])
    return [100 * float(low[0]), 100 * float(high[0])]


def _numbered(rows: Sequence[dict], classes: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return truth and what was named as columns of the confusion matrix."""
    place = {name: i for i, name in enumerate(classes)}
    behind = {kind: len(classes) + i for i, kind in enumerate(UNNAMED)}
    given = [behind[row["verdict"]] if row["named"] is None else place[row["named"]] for row in rows]
    return np.array([place[row["class"]] for row in rows]), np.array(given)


def _groups(rows: Sequence[dict]) -> np.ndarray:
    return np.unique([row["group"] for row in rows], return_inverse=True)[1]
