"""The judge's agreement with people: ratings of answers, weighted kappa and signed error, kept in run_dir."""

import json
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from math import isnan

from actors.judge.cache import JudgeIdentity
from actors.judge.prompt import RUBRIC_VERSION
from actors.judge.verdict import TOP_LABEL
from actors.maths.agreement import mean_kappa, measure_signed_error
from actors.maths.columns import number_names, to_floats
from cluster.artifacts import file_sha256, write_text
from jobs.core.run import Run
from jobs.judging.answer_tables import REQUIRED, AnswerTable, read_table_of
from jobs.judging.asking import KeyedVerdict, Text

FILE = "agreement.json"


@dataclass(frozen=True)
class Rating:
    """The rating (0-4) of one answer (`item`) by one person (`rater`).

    An item is the answer's text with its sample_id or image, since several models answer one question. `cluster` is the
    series, else the image, else the sample_id, else the item.
    """

    item: Hashable
    text: Text
    rating: int
    rater: str
    cluster: str


def read_ratings(path: str) -> AnswerTable:
    """Read ratings: columns rating and either sample_id or question, reference, answer; rater, image, group if known.

    ValueError: a column is missing, or a rating is not a whole number from 0 to 4.
    """
    table = read_table_of(path, ("rating",), optional=(*REQUIRED, "sample_id", "rater", "image", "group", "class"))
    if not has_texts(table.rows) and any(row.get("sample_id") is None for row in table.rows):
        raise ValueError(f"{path} must say which answer is rated: sample_id, or {', '.join(REQUIRED)}, in every row.")
    for number, row in enumerate(table.rows):
        try:
            value = float(row["rating"])
        except ValueError:
            value = -1.0
        if value not in range(TOP_LABEL + 1):
            raise ValueError(f"{path}, rating {number + 1}: {row['rating']!r} is not a whole number, 0 to {TOP_LABEL}.")
    return table


def has_texts(rows: Sequence[Mapping]) -> bool:
    """Tell whether the rows of ratings hold the answers' texts."""
    return all(row.get(key) is not None for row in rows for key in REQUIRED)


def resolve_ratings(rated: AnswerTable, answers: Sequence[Mapping]) -> list[Rating]:
    """Return the ratings with the answers' texts, taken from `answers` by sample_id unless the ratings hold them.

    ValueError: an answer is missing, its sample_id stands for several, or one person gave it two ratings.
    """
    ratings: dict[tuple[Hashable, str], Rating] = {}
    holds_texts = has_texts(rated.rows)
    by_id = {row["sample_id"]: row for row in answers if row.get("sample_id") is not None}
    several = {id_ for id_, count in Counter(row.get("sample_id") for row in answers).items() if count > 1}
    for number, row in enumerate(rated.rows):
        if not holds_texts and row["sample_id"] in several:
            raise ValueError(
                f"{rated.path} rates sample_id {row['sample_id']!r}, which several of the judged answers have: "
                f"give {', '.join(REQUIRED)} with the ratings, too."
            )
        if not holds_texts and row["sample_id"] not in by_id:
            raise ValueError(
                f"{rated.path} rates sample_id {row['sample_id']!r}, which is not among the judged answers."
            )
        answer = row if holds_texts else by_id[row["sample_id"]]
        question, reference, candidate = (answer[key] for key in REQUIRED)
        text, rater = (question, reference, candidate), str(row.get("rater") or "")
        item = (row.get("sample_id") or row.get("image"), text)
        rating = int(float(row["rating"]))
        if (item, rater) in ratings and ratings[item, rater].rating != rating:  # equal: two models answered alike
            raise ValueError(
                f"{rated.path}, rating {number + 1}: this answer was rated before, {ratings[item, rater].rating} by "
                f"{rater or 'the only rater'}; name different people in a column rater."
            )
        units = [unit for unit in ("group", "image", "sample_id") if answer.get(unit) is not None]
        cluster = f"{units[0]} {answer[units[0]]}" if units else str(item)
        ratings[item, rater] = Rating(item, text, rating, rater, cluster)
    return list(ratings.values())


def record(
    run: Run,
    rated: AnswerTable,
    ratings: Sequence[Rating],
    verdicts: Mapping[Text, KeyedVerdict],
    identity: JudgeIdentity,
) -> dict:
    """Compare the verdicts with the ratings, write run_dir/agreement.json, and return what it says."""
    labels = {rating.item: verdicts[rating.text].verdict.label for rating in ratings}
    measured = {
        **_identity_columns(identity),
        "ratings": rated.name,
        "sha256": file_sha256(rated.path),
        "raters": len({rating.rater for rating in ratings}),
        "ratings_count": len(ratings),
        "unscored": sum(label is None for label in labels.values()),
        **measure_agreement(ratings, {item: label for item, label in labels.items() if label is not None}),
    }
    write_text(run.folder / FILE, json.dumps(measured, indent=1))
    return measured


def measure_agreement(ratings: Sequence[Rating], labels: Mapping[Hashable, int]) -> dict:
    """Return kappa (judge with person, person with person) and signed error (judge - mean of people, labels 0-4).

    Intervals at 95 % resample images. kappa is None where it is undefined. ValueError: no rated answer has a label.
    """
    scored = [rating for rating in ratings if rating.item in labels]
    if not scored:
        raise ValueError("No answer has both a rating and a verdict: there is nothing to compare.")
    cluster = {rating.item: rating.cluster for rating in ratings}
    people: dict[Hashable, dict[str, int]] = {}
    for rating in ratings:
        people.setdefault(rating.item, {})[rating.rater] = rating.rating
    items = [item for item in people if item in labels]
    error, low, high = measure_signed_error(
        [labels[item] for item in items],
        [list(people[item].values()) for item in items],
        number_names([cluster[item] for item in items]),
    )
    judge = [(labels[r.item], r.rating, r.rater, r.cluster) for r in scored]
    pairs = [
        (by_rater[rater], by_rater[second_rater], f"{rater}\n{second_rater}", cluster[item])
        for item, by_rater in people.items()
        for rater, second_rater in combinations(sorted(by_rater), 2)
    ]
    return {
        "answers": len(items),
        "clusters": len({cluster[item] for item in items}),
        **_kappa("kappa", judge),
        "signed_error": error,
        "signed_error_interval": [low, high],
        **_kappa("people_kappa", pairs),
    }


def _kappa(name: str, entries: Sequence[tuple[int, int, str, str]]) -> dict:
    if not entries:
        return {name: None, f"{name}_interval": None}
    first, second, pairs, names = zip(*entries, strict=True)
    value, low, high = mean_kappa(to_floats(first), to_floats(second), number_names(pairs), number_names(names))
    undefined = isnan(value)
    return {name: None if undefined else value, f"{name}_interval": None if undefined else [low, high]}


def _identity_columns(identity: JudgeIdentity) -> dict:
    return {"identity": asdict(identity), "rubric": RUBRIC_VERSION}


def calibration(run: Run, identity: Mapping) -> dict | None:
    """Return the recorded agreement of this very judge and rubric with people; None: uncalibrated."""
    try:
        recorded = json.loads((run.folder / FILE).read_text())
    except FileNotFoundError:
        return None
    same = recorded["identity"] == dict(identity) and recorded["rubric"] == RUBRIC_VERSION
    return recorded if same else None


def sentence(measured: Mapping | None) -> str:
    """Say how far the judge agrees with people; None: it was never measured."""
    if measured is None:
        return "uncalibrated: its agreement with people is unknown (jobs.judge --agreement)"
    low, high = measured["signed_error_interval"]
    words = (
        f"against {measured['answers']} answers rated by people: weighted kappa {_format_kappa(measured, 'kappa')}, "
    )
    words += f"judge - people {measured['signed_error']:+.2f} [{low:+.2f}, {high:+.2f}] on 0-{TOP_LABEL}"
    if measured["raters"] > 1:
        words += f"; people among themselves: weighted kappa {_format_kappa(measured, 'people_kappa')}"
    return words


def _format_kappa(measured: Mapping, name: str) -> str:
    if measured[name] is None:
        return "undefined"
    return "{:.2f} [{:.2f}, {:.2f}]".format(measured[name], *measured[f"{name}_interval"])
