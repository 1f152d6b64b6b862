"""The metrics beside the score, as the report's tables show them."""

from collections.abc import Mapping, Sequence

from actors.maths import repetition

RETAINED = {
    "baseline": "baseline score",
    "exact": "verbatim",
    "name_accuracy": "disease named",
    "macro_f1": "macro F1",
    "stopped": "ended",
    "without_loop": "without loop",
}
LOOPS = {"block": repetition.LONGEST_BLOCK, "copies": repetition.COPIES, "shortest": repetition.SHORTEST_LOOP}


def names(metrics: Mapping[str, Mapping]) -> list[dict]:
    """Return every method's confusion matrix, none where the name was not asked for; metrics: by method."""
    return [
        {
            "method": method,
            **{key: metrics_of_method[key] for key in ("macro_f1_pct", "macro_f1_interval_pct")},
            "right": metrics_of_method["name_verdicts"].get("right", 0),
            "asked": sum(metrics_of_method["name_verdicts"].values()),
            "columns": [*metrics_of_method["confusion"]["classes"], *metrics_of_method["confusion"]["unnamed"]],
            "lines": _lines(metrics_of_method["confusion"]),
        }
        for method, metrics_of_method in metrics.items()
        if metrics_of_method["confusion"]
    ]


def _lines(confusion: Mapping) -> list[dict]:
    """Return the matrix by rows; a cell's kind decides its colour: right, wrong or empty."""
    lines = []
    for number, (label, counts) in enumerate(zip(confusion["classes"], confusion["counts"], strict=True)):
        kinds = ["empty" if not n else "right" if place == number else "wrong" for place, n in enumerate(counts)]
        lines.append({"label": label, "cells": [{"count": n, "kind": k} for n, k in zip(counts, kinds, strict=True)]})
    return lines


def tabulate_retention(rows: Sequence[Mapping]) -> dict:
    """Return the table of what every method but the first retains."""
    keys = [key for key in RETAINED if key in rows[0]["retention"]]
    return {
        "heads": [RETAINED[key] for key in keys],
        "lines": [(row["method"], [row["retention"][key] for key in keys]) for row in rows[1:]],
    }
