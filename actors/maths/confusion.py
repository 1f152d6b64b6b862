"""Which class was named for which: confusion matrix and macro F1, with the image as the unit. numpy only."""

import numpy as np
from jaxtyping import Float, Int

from actors.maths.statistics import cluster_draws


def confusion(
    truth_N: Int[np.ndarray, "n"], given_N: Int[np.ndarray, "n"], rows: int, columns: int
) -> Int[np.ndarray, "rows columns"]:
    """Count how often class `truth` got `given`, both numbered from 0."""
    counts = np.zeros((rows, columns), dtype=np.int64)
    np.add.at(counts, (truth_N, given_N), 1)
    return counts


def macro_f1(counts_KG: Int[np.ndarray, "k g"]) -> float:
    """Return the mean F1 of the classes that occur, as a fraction; ValueError if none does.

    counts_KG: a confusion matrix whose first K columns are the K classes; what stands in further columns (no class
    named, several) misses its class and is no false find of another. F1 = 2 hits / (times it was true + times given).
    """
    classes = len(counts_KG)
    hits, asked, given = np.diag(counts_KG), counts_KG.sum(axis=1), counts_KG[:, :classes].sum(axis=0)
    if not asked.any():
        raise ValueError("The F1 of 0 answers is undefined.")
    return float(_macro(hits[None], asked[None], given[None])[0])


def macro_f1_draws(
    truth_N: Int[np.ndarray, "n"],
    given_N: Int[np.ndarray, "n"],
    classes: int,
    clusters_N: Int[np.ndarray, "n"],
    draws: int = 2000,
    seed: int = 0,
) -> Float[np.ndarray, "draws"]:
    """Return macro F1 when whole clusters (images) are resampled; given_N of `classes` or more is no class.

    Two models' answers to the same questions, with one seed, have the same draws.
    """
    _, index_N = np.unique(clusters_N, return_inverse=True)
    count = int(index_N.max()) + 1
    hits, asked, given = (np.zeros((count, classes)) for _ in range(3))
    right, named = truth_N == given_N, given_N < classes
    np.add.at(asked, (index_N, truth_N), 1)
    np.add.at(hits, (index_N[right], truth_N[right]), 1)
    np.add.at(given, (index_N[named], given_N[named]), 1)
    chosen = cluster_draws(count, draws, seed)
    return _macro(chosen @ hits, chosen @ asked, chosen @ given)


def bootstrap_macro_f1(
    truth_N: Int[np.ndarray, "n"], given_N: Int[np.ndarray, "n"], classes: int, clusters_N: Int[np.ndarray, "n"]
) -> tuple[float, Float[np.ndarray, "draws"]]:
    """Return macro F1 as `macro_f1` does (a fraction), and its draws as `macro_f1_draws` does."""
    counts = confusion(truth_N, given_N, classes, max(classes, int(given_N.max()) + 1))
    return macro_f1(counts), macro_f1_draws(truth_N, given_N, classes, clusters_N)


def _macro(hits_BK: np.ndarray, asked_BK: np.ndarray, given_BK: np.ndarray) -> np.ndarray:
    f1_BK = 2 * hits_BK / np.maximum(asked_BK + given_BK, 1)
    return (f1_BK * (asked_BK > 0)).sum(axis=1) / (asked_BK > 0).sum(axis=1)
