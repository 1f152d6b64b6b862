"""Does the model still use the image? The same questions with a blank image, and with an image of another class.

A model that answers from the question alone loses nothing; one that uses the image falls to chance.
"""

from collections.abc import Mapping, Sequence

from actors.maths.sampling import draw_partners
from actors.specs import Sample
from jobs.scoring.metrics import fall, mean, name_accuracy, share
from jobs.scoring.rows import AnswerRow, ControlRow

BLANK, SWAPPED = "blank", "swapped"


def blank_samples(rows: Sequence[Mapping], image: str) -> list[Sample]:
    """Return each distinct question once, about the blank `image`; a sample's id is its question."""
    return [Sample(question, image, question) for question in sorted({row["question"] for row in rows})]


def blank_rows(rows: Sequence[Mapping], answers: Mapping[str, dict]) -> list[dict]:
    """Return the rows with the answers that their questions got about the blank image."""
    return [
        {**row, **_answer(answers[row["question"]]), "control": BLANK, "shown": None}
        for row in rows
        if row["question"] in answers
    ]


def swapped_rows(rows: Sequence[Mapping], seed: int) -> list[dict]:
    """Return the rows with the answers that the same questions got about an image of another class.

    The questions are the same for all images, so these answers exist already: every image gets another one, drawn with
    `seed`. Rows whose question was not answered about it are left out; with a single class, all are.
    """
    classes = {row["image"]: row["class"] for row in rows}
    partner = draw_partners(classes, seed)
    row_of = {(row["image"], row["question"]): row for row in rows}
    swapped = []
    for row in rows:
        other = row_of.get((partner.get(row["image"]), row["question"]))
        if other:
            swapped.append({**row, **_answer(other), "control": SWAPPED, "shown": other["image"]})
    return swapped


def summary(rows: Sequence[AnswerRow], controls: Sequence[ControlRow]) -> dict[str, dict | None]:
    """Return how far score and disease names fall, by control, paired by question; None for one without rows.

    Both are scored rows. Falls in points; same_answer_pct: the share of questions answered in the same words.
    """
    before = {row["sample_id"]: row for row in rows}
    falls: dict[str, dict | None] = {}
    for kind in (BLANK, SWAPPED):
        after = [row for row in controls if row["control"] == kind]
        pairs = [(before[row["sample_id"]], row) for row in after]
        named = [pair for pair in pairs if pair[1]["verdict"] is not None]
        falls[kind] = (
            {
                "answers": len(after),
                **mean("baseline", after),
                **fall(
                    "baseline",
                    [before_row["baseline"] for before_row, _ in pairs],
                    [row["baseline"] for row in after],
                    after,
                ),
                **name_accuracy(after),
                **_name_fall(named),
                **share("same_answer", [before_row["answer"] == other["answer"] for before_row, other in pairs], after),
            }
            if after
            else None
        )
    return falls


def _name_fall(named: Sequence[tuple[AnswerRow, ControlRow]]) -> dict:
    before, after = ([pair[side]["verdict"] == "right" for pair in named] for side in (0, 1))
    return fall("name", before, after, [row for _, row in named])


def _answer(row: Mapping) -> dict:
    return {key: row[key] for key in ("answer", "token_ids", "tokens", "stopped")}
