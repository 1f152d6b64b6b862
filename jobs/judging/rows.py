"""The table of verdicts, and the columns that a judged model has in every other table. Percent is 0 to 100."""

from typing import Any, NotRequired, TypedDict

from jobs.core.facts import Interval
from jobs.core.rows import Rows


class VerdictColumns(TypedDict):
    """The judge's verdict on one answer."""

    judge_label: int | None  # 0 to 4; None: unscored
    judge_reason: str
    judge_expected: float | None  # mean label by the probabilities, 0 to 4; None: the engine gives none
    judge_label_mass: float | None  # probability of the five labels together, 0 to 1
    judge_raw: list[str]  # its output, a text for each try
    judge_tries: int
    judge_key: str  # hash of judge, prompt and texts


# Functional syntax: `class` is a keyword.
JudgedAnswer = TypedDict(
    "JudgedAnswer",
    {
        "sample_id": NotRequired[str],
        "question_id": NotRequired[str],
        "image": NotRequired[str],
        "group": NotRequired[int | str],
        "class": NotRequired[str],
        "question": str,
        "reference": str,
        "answer": str,
    },
)


class VerdictRow(JudgedAnswer, VerdictColumns):
    """One answer with its verdict; columns that the table of answers lacks are absent."""


class JudgedColumns(TypedDict):
    """What a table of results says of one judged model; all None where is_llm_judge is False."""

    is_llm_judge: bool
    judge: str | None  # its name
    judge_pct: float | None  # mean label / 4; None: more than 2 % are unscored
    judge_interval_pct: Interval | None
    judge_bounds_pct: Interval | None  # with all unscored answers at 0, and at 4
    judge_expected_pct: float | None  # from judge_expected
    judge_scored: int | None  # answers
    judge_total: int | None
    judge_unscored: dict[str, int] | None  # by reason
    judge_flagged: bool | None  # it failed a control
    judge_controls: dict[str, Any] | None
    judge_calibrated: bool | None
    judge_agreement: dict[str, Any] | None  # with people


VERDICTS = Rows("verdicts.parquet", VerdictRow)
