"""Verdicts: how the judge's constrained output is read, and what a table of verdicts may claim."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ValidationError

TOP_LABEL = 4
MAX_UNSCORED = 0.02  # share of verdicts that may lack a label before there is no headline


@dataclass(frozen=True)
class Verdict:
    """One answer's verdict; the label None means UNSCORED, which is never a score.

    reason: the judge's, or why there is no label; expected: mean of the labels under their renormalised
    probabilities (0-4), label_mass: what these summed to (fraction), both None where the engine gives none;
    raw: all outputs of the judge in order, of which the last counts; tries: number of calls, failed ones included.
    """

    label: int | None
    reason: str
    expected: float | None
    label_mass: float | None
    raw: tuple[str, ...]
    tries: int

    @property
    def scored(self) -> bool:
        """Whether there is a label."""
        return self.label is not None


def read_output(text: str, kind: type[BaseModel]) -> BaseModel:
    """Return the judge's output as `kind`; ValueError says what is wrong with it.

    It must be exactly one JSON object, with each key once and in the schema's order: a label before its reason, an echo
    or a second verdict is an error.
    """
    wanted = list(kind.model_fields)

    def check_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
        if [name for name, _ in pairs] != wanted:
            raise ValueError(f"the keys are {[name for name, _ in pairs]} instead of {wanted}")
        return dict(pairs)

    try:
        return kind.model_validate(json.loads(text, object_pairs_hook=check_keys))
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc'])) or 'output'}: {first['msg']}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def expected_score(probabilities: Sequence[float]) -> tuple[float | None, float]:
    """Return sum_k k p_k / sum_k p_k of the labels' probabilities (None if all are 0), and the mass sum_k p_k."""
    mass = sum(probabilities)
    return (sum(k * p for k, p in enumerate(probabilities)) / mass if mass else None), mass


def tally(labels: Sequence[int | None]) -> dict:
    """Summarise labels: {scored, total, judge_pct, judge_bounds_pct}.

    judge_pct: mean of the scored labels / 4 * 100; None (no headline) if more than 2 % are unscored. judge_bounds_pct:
    the same with all unscored ones at 0 and at 4.
    """
    scored = [label for label in labels if label is not None]
    missing, total = len(labels) - len(scored), len(labels)
    headline = total > 0 and missing <= MAX_UNSCORED * total
    return {
        "scored": len(scored),
        "total": total,
        "judge_pct": _percent(sum(scored), len(scored)) if headline else None,
        "judge_bounds_pct": [_percent(sum(scored) + missing * end, total) for end in (0, TOP_LABEL)] if total else None,
    }


def _percent(points: int, answers: int) -> float:
    return 100 * points / (TOP_LABEL * answers)
