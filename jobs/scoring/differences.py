"""Paired differences of models from a reference model, on the questions that both answered; the image is the unit."""

from collections.abc import Mapping, Sequence
from typing import Any

from actors.maths.columns import number_names, to_flags, to_percent
from actors.maths.paired import compare_pairs, finding, holm, mcnemar_p

_UNKNOWN = {"interval_pct": None, "p_holm": None, "detectable_pct": None, "finding": None}


def differences(
    models: Sequence[Mapping[str, float | None]], groups: Mapping[str, int | str], top: float, label: str = "difference"
) -> list[dict]:
    """Compare every model's scores (by sample_id; None: unscored) with the first one's; one dict of columns each.

    groups: sample_id -> image or series; top: the highest score, i.e. 100 %. finding: "identical", "better", "worse"
    or "unresolved" after Holm's correction over the models; None for the first, and where nothing can be compared.
    detectable_pct: what 80 % power would find; None where it is 0 or undefined.
    """
    columns = [_difference(models[0], model, groups, top) for model in models[1:]]
    compared = [column for column in columns if column["finding"] is not None]
    for column, adjusted in zip(compared, holm([column["p_holm"] for column in compared]), strict=True):
        column["p_holm"] = adjusted
        if column["finding"] != "identical":
            low, high = column["interval_pct"]
            column["finding"] = finding(low, high, adjusted)
    first: dict[str, Any] = {**_UNKNOWN, "pct": None, "pairs": len(_shared(models[0], models[0]))}
    if first["pairs"]:
        first |= {"pct": 0.0, "interval_pct": [0.0, 0.0]}
    return [{f"{label}_{key}": value for key, value in column.items()} for column in (first, *columns)]


def name_tests(models: Sequence[Mapping[str, bool]]) -> list[float | None]:
    """Return McNemar's p value of every model's disease names (sample_id -> right) against the first one's, after Holm.

    None for the first, and for all where nothing was named.
    """
    raw = []
    for model in models[1:]:
        shared = _shared(models[0], model)
        raw.append(mcnemar_p(to_flags([right for _, _, right in shared]), to_flags([right for _, right, _ in shared])))
    return [None, *(holm(raw) if models[0] else [None] * len(raw))]


def _difference(
    first: Mapping[str, float | None], other: Mapping[str, float | None], groups: Mapping[str, int | str], top: float
) -> dict:
    """Compare two models; the p value is not adjusted yet."""
    shared = _shared(first, other)
    if not shared:
        return {**_UNKNOWN, "pct": None, "pairs": 0}
    difference = compare_pairs(
        to_percent([score for _, _, score in shared], top),
        to_percent([score for _, score, _ in shared], top),
        number_names([groups[sample] for sample, _, _ in shared]),
    )
    return {
        "pct": difference.mean,
        "interval_pct": [difference.low, difference.high],
        "p_holm": difference.p,
        "detectable_pct": difference.detectable,
        "finding": "identical" if difference.identical else "unresolved",
        "pairs": len(shared),
    }


def _shared(first: Mapping, other: Mapping) -> list[tuple]:
    """Return the sample_ids that both scored, sorted, with both scores."""
    pairs = ((sample, first[sample], other.get(sample)) for sample in sorted(first))
    return [pair for pair in pairs if None not in pair]
