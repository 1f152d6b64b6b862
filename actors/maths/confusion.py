"""Confusion matrix of true and named classes, and macro F1 with intervals over images. numpy only."""

import numpy as np
from jaxtyping import Float, Int

from actors.maths.statistics import cluster_draws


def confusion(
    truth_N: Int[np.ndarray, "n"], given_N: Int[np.ndarray, "n"], rows: int, columns: int
) -> Int[np.ndarray, "rows columns"]:
    """Return how often class `given` was named where `truth` was true, both numbered from 0."""
    counts = np.zeros((rows, columns), dtype=np.int64)
    np.add.at(counts, (truth_N, given_N), 1)
    return counts


def macro_f1(counts_KG: Int[np.ndarray, "k g"]) -> float:
    """Return the mean F1 of the classes that occur, as a fraction; ValueError if none does.

    counts_KG: a confusion matrix whose first K columns are the K classes. Answers in further columns (no class named,
    or several) are misses of their class, and false positives of none. F1 = 2 hits / (times true + times named).
    """
    classes = len(counts_KG)
    hits, true, named = np.diag(counts_KG), counts_KG.sum(axis=1), counts_KG[:, :classes].sum(axis=0)
    if not true.any():
        raise ValueError("The F1 of 0 answers is undefined.")
    return float(_macro(hits[None], true[None], named[None])[0])


def macro_f1_draws(
    truth_N: Int[np.ndarray, "n"],
    given_N: Int[np.ndarray, "n"],
    classes: int,
    clusters_N: Int[np.ndarray, "n"],
    draws: int = 2000,
    seed: int = 0,
) -> Float[np.ndarray, "draws"]:
    """Return cluster-bootstrap draws of macro F1 (clusters: images); in given_N, `classes` and above name no class.

    Two models' answers to the same questions have the same draws of images for the same seed.
    """
    _, index_N = np.unique(clusters_N, return_inverse=True)
    count = int(index_N.max()) + 1
    hits, true, named = (np.zeros((count, classes)) for _ in range(3))
    right, is_class = truth_N == given_N, given_N < classes
    np.add.at(true, (index_N, truth_N), 1)
    np.add.at(hits, (index_N[right], truth_N[right]), 1)
    np.add.at(named, (index_N[is_class], given_N[is_class]), 1)
    weights = cluster_draws(count, draws, seed)
    return _macro(weights @ hits, weights @ true, weights @ named)


def bootstrap_macro_f1(
    truth_N: Int[np.ndarray, "n"], given_N: Int[np.ndarray, "n"], classes: int, clusters_N: Int[np.ndarray, "n"]
) -> tuple[float, Float[np.ndarray, "draws"]]:
    """Return macro F1 as `macro_f1` does (a fraction), and its draws as `macro_f1_draws` does."""
    counts = confusion(truth_N, given_N, classes, max(classes, int(given_N.max()) + 1))
    return macro_f1(counts), macro_f1_draws(truth_N, given_N, classes, clusters_N)


def _macro(hits_BK: np.ndarray, true_BK: np.ndarray, named_BK: np.ndarray) -> np.ndarray:
    f1_BK = 2 * hits_BK / np.maximum(true_BK + named_BK, 1)
    return (f1_BK * (true_BK > 0)).sum(axis=1) / (true_BK > 0).sum(axis=1)
