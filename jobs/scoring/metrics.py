"""What a table of scored answers says about a model: shares and scores in percent, intervals at 95 %.

The unit of every interval is the image: answers about one image, or about near-duplicates, form one cluster.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

from actors.baseline import ClassName, baseline_score, name_given, name_verdict
from actors.judge.verdict import TOP_LABEL
from actors.maths.columns import Array, number_names, to_flags, to_floats, to_places
from actors.maths.confusion import bootstrap_macro_f1, confusion
from actors.maths.paired import bootstrap_difference, bootstrap_ratio, compute_ratio
from actors.maths.repetition import loop_length
from actors.maths.statistics import bootstrap_mean, bound_draws, cluster_share_interval
from jobs.config.schema import ClassConfig
from jobs.scoring.rows import AnswerRow

NAME_QUESTION = "name"
UNNAMED = ("none", "multiple", "refused")  # the columns of the confusion matrix after the classes
GOOD = {  # the metrics whose retention is reported: in each, more is better
    "baseline": lambda row: row["baseline"],
    "exact": lambda row: row["answer"] == row["reference"],
    "name_accuracy": lambda row: row["verdict"] == "right",
    "stopped": lambda row: row["stopped"],
    "without_loop": lambda row: row["loop_tokens"] == 0,
}


def score_answers(rows: Sequence[dict], cosines: Sequence[float], classes: Sequence[ClassConfig]) -> list[dict]:
    """Return the rows with similarity, baseline score, loop and, for the name question, what was named and its verdict.

    cosines: the embedding similarity of every row's answer with its reference.
    """
    kinds = [ClassName(kind.name, tuple(kind.synonyms)) for kind in classes]
    scored = []
    for row, cosine in zip(rows, cosines, strict=True):
        answer, truth = row["answer"], row["class"]
        asks_name = row["question_id"] == NAME_QUESTION
        new = {
            "similarity": cosine,
            "baseline": baseline_score(answer, row["reference"], truth, cosine, kinds),
            "verdict": name_verdict(answer, truth, kinds) if asks_name else None,
            "named": name_given(answer, kinds)[0] if asks_name else None,
            "loop_tokens": loop_length(row["token_ids"][: row["tokens"]]),
        }
        scored.append({**{key: value for key, value in row.items() if key != "removed"}, **new})
    return scored


def metrics(rows: Sequence[AnswerRow], classes: Sequence[str]) -> dict:
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


def mean(label: str, rows: Sequence[Mapping]) -> dict:
    """Return the mean (percent) of a column from 0 to 1, and its bootstrap interval; None without rows."""
    if not rows:
        return {f"{label}_pct": None, f"{label}_interval_pct": None}
    value, low, high = bootstrap_mean(to_floats([row[label] for row in rows]), _groups(rows))
    return {f"{label}_pct": 100 * value, f"{label}_interval_pct": [100 * low, 100 * high]}


def share(label: str, hits: Sequence[bool], rows: Sequence[Mapping]) -> dict:
    """Return the share (percent) of rows that are hits, and its interval; None without rows."""
    if not rows:
        return {f"{label}_pct": None, f"{label}_interval_pct": None}
    low, high = cluster_share_interval(to_flags(hits), _groups(rows))
    return {f"{label}_pct": 100 * sum(hits) / len(rows), f"{label}_interval_pct": [100 * low, 100 * high]}


def name_accuracy(rows: Sequence[AnswerRow]) -> dict:
    """Return the share of answers to the name question that name the right class and no other."""
    named = [row for row in rows if row["verdict"] is not None]
    accuracy = share("name", [row["verdict"] == "right" for row in named], named)
    return {"name_accuracy": accuracy["name_pct"], "name_accuracy_interval": accuracy["name_interval_pct"]}


def _names(rows: Sequence[AnswerRow], classes: Sequence[str]) -> dict:
    """Return the columns on disease names; None where the name was not asked for."""
    columns = {**name_accuracy(rows), "name_verdicts": dict(Counter(row["verdict"] for row in rows))}
    if not rows:
        return {**columns, "macro_f1_pct": None, "macro_f1_interval_pct": None, "confusion": None}
    counts = confusion(*_numbered(rows, classes), len(classes), len(classes) + len(UNNAMED))
    value, draws = _macro_f1(rows, classes, _groups(rows))
    return {
        **columns,
        "macro_f1_pct": 100 * value,
        "macro_f1_interval_pct": [100 * bound for bound in bound_draws(draws)],
        "confusion": {"classes": list(classes), "unnamed": list(UNNAMED), "counts": counts.tolist()},
    }


def by_name(rows: Sequence[AnswerRow]) -> dict[str, list[AnswerRow]]:
    """Split the answers to other questions by whether the disease of their image was named rightly."""
    verdicts = {row["image"]: row["verdict"] for row in rows if row["verdict"] is not None}
    parts: dict[str, list[AnswerRow]] = {"right": [], "not_right": []}
    for row in rows:
        if row["verdict"] is None and row["image"] in verdicts:
            parts["right" if verdicts[row["image"]] == "right" else "not_right"].append(row)
    return parts


def given_name(rows: Sequence[AnswerRow]) -> dict:
    """Return the scores of the parts that `by_name` makes."""
    return {
        part: {
            "images": len({row["image"] for row in part_rows}),
            "answers": len(part_rows),
            **mean("baseline", part_rows),
            **share("exact", [GOOD["exact"](row) for row in part_rows], part_rows),
        }
        for part, part_rows in by_name(rows).items()
    }


def judge_given_name(rows: Sequence[AnswerRow], labels: Mapping[str, int | None]) -> dict | None:
    """Return the judge's scores of these parts; labels: by sample_id, from 0 to 4; None without any."""
    if not labels:
        return None
    columns = {}
    for part, part_rows in by_name(rows).items():
        label_of = {row["sample_id"]: label for row in part_rows if (label := labels.get(row["sample_id"])) is not None}
        scored = [
            {**row, "judge": label_of[row["sample_id"]] / TOP_LABEL}
            for row in part_rows
            if row["sample_id"] in label_of
        ]
        columns[part] = {"images": len({row["image"] for row in scored}), **mean("judge", scored)}
    return columns


def retention(original: Sequence[AnswerRow], rows: Sequence[AnswerRow], classes: Sequence[str]) -> dict[str, dict]:
    """Return what a model retains of the original's metrics, on the questions that both answered (percent).

    The interval is that of the ratio, with the same draws for both models; None where the original's may be 0.
    """
    other = {row["sample_id"]: row for row in original}
    pairs = [(row, other[row["sample_id"]]) for row in rows if row["sample_id"] in other]
    named = [pair for pair in pairs if pair[0]["verdict"] is not None]
    retained = {}
    for label, score in GOOD.items():
        if chosen := named if label == "name_accuracy" else pairs:
            after, before = zip(*chosen, strict=True)
            groups = [row["group"] for row in before]
            retained[label] = compute_retention([score(row) for row in after], [score(row) for row in before], groups)
    if named:
        after, before = zip(*named, strict=True)
        (value, draws), (base, base_draws) = (_macro_f1(side, classes, _groups(before)) for side in (after, before))
        retained["macro_f1"] = _ratio(*compute_ratio(value, base, draws, base_draws))
    return retained


def compute_retention(scores: Sequence[float], original: Sequence[float], groups: Sequence) -> dict:
    """Return the ratio of two models' mean scores on the same questions, and its interval, as `retention` does."""
    return _ratio(*bootstrap_ratio(to_floats(scores), to_floats(original), number_names(groups)))


def fall(label: str, before: Sequence[float], after: Sequence[float], rows: Sequence[Mapping]) -> dict:
    """Return how far the mean of a score falls on the same questions, and its interval (points), None without rows."""
    if not rows:
        return {f"{label}_fall_pct": None, f"{label}_fall_interval_pct": None}
    value, low, high = bootstrap_difference(to_floats(before), to_floats(after), _groups(rows))
    return {f"{label}_fall_pct": 100 * value, f"{label}_fall_interval_pct": [100 * low, 100 * high]}


def _macro_f1(rows: Sequence[AnswerRow], classes: Sequence[str], groups: Array) -> tuple[float, Array]:
    """Return macro F1, and its draws when whole groups are resampled (fractions)."""
    truth, named = _numbered(rows, classes)
    return bootstrap_macro_f1(truth, named, len(classes), groups)


def _ratio(value: float | None, bounds: tuple[float, float] | None) -> dict:
    return {
        "pct": None if value is None else 100 * value,
        "interval_pct": [100 * bound for bound in bounds] if bounds else None,
    }


def _numbered(rows: Sequence[AnswerRow], classes: Sequence[str]) -> tuple[Array, Array]:
    """Return the true and the named class of every row, as columns of the confusion matrix."""
    place = {name: i for i, name in enumerate(classes)}
    unnamed = {kind: len(classes) + i for i, kind in enumerate(UNNAMED)}
    named = [place[row["named"]] if row["named"] is not None else unnamed[row["verdict"] or ""] for row in rows]
    return to_places([place[row["class"]] for row in rows]), to_places(named)


def _groups(rows: Sequence[Mapping]) -> Array:
    return number_names([row["group"] for row in rows])
