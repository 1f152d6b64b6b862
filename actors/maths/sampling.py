"""Seeded samples of questions and images: a seed always gives the same sample. numpy only."""

import random
from collections.abc import Mapping, Sequence

import numpy as np


def draw_calibration(images: Sequence[str], samples: int, seed: int, per_image: int | None = None) -> list[int]:
    """Return the sorted indices of `samples` questions for calibration (all, if there are fewer).

    images: the image of each question. per_image: draw images, and at most this many questions about each; None: draw
    questions one by one.
    """
    stream = np.random.default_rng(seed)
    shuffled = stream.permutation(len(images)).tolist()
    if per_image is not None:
        by_image: dict[str, list[int]] = {}
        for i in shuffled:
            by_image.setdefault(images[i], []).append(i)
        turns = stream.permutation(sorted(by_image)).tolist()  # any image is as likely as another
        shuffled = [i for image in turns for i in by_image[image][:per_image]]
    return sorted(shuffled[:samples])


def draw_places(count: int, samples: int, seed: int) -> list[int]:
    """Return `samples` of the indices 0 to count - 1 (all, if there are fewer), each once, in a random order."""
    return np.random.default_rng(seed).permutation(count)[:samples].tolist()


def draw_partners(classes: Mapping[str, str], seed: int) -> dict[str, str]:
    """Return an image of another class for every image; {} where there is one class.

    classes: the class of each image. All images of other classes are equally likely, and may be drawn several times.
    """
    images, stream = sorted(classes), random.Random(seed)
    partners = {}
    for image in images:
        if others := [other for other in images if classes[other] != classes[image]]:
            partners[image] = stream.choice(others)
    return partners
