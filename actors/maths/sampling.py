"""Drawing questions and images from a seed: the same for the same seed, for ever. numpy only."""

import random
from collections.abc import Mapping, Sequence

import numpy as np


def draw_calibration(images: Sequence[str], samples: int, seed: int, per_image: int | None = None) -> list[int]:
    """Return places of `samples` questions (fewer where there are no more), given the image of each, in their order.

    per_image: draw images, and at most so many questions about each; None: draw questions one by one.
    """
    stream = np.random.default_rng(seed)
    shuffled = stream.permutation(len(images)).tolist()
    if per_image is not None:
        asked: dict[str, list[int]] = {}
        for i in shuffled:
            asked.setdefault(images[i], []).append(i)
        turns = stream.permutation(sorted(asked)).tolist()  # any image is as likely as another
        shuffled = [i for image in turns for i in asked[image][:per_image]]
    return sorted(shuffled[:samples])


def draw_places(count: int, samples: int, seed: int) -> list[int]:
    """Return `samples` of the places 0 to count - 1 (all where there are no more), each once, in a random order."""
    return np.random.default_rng(seed).permutation(count)[:samples].tolist()


def draw_partners(classes: Mapping[str, str], seed: int) -> dict[str, str]:
    """Return an image of another class for every image, given the class of each; none where there is one class.

    Any image of another class is as likely as another, and may be drawn for several.
    """
    images, stream = sorted(classes), random.Random(seed)
    partners = {}
    for image in images:
        if others := [other for other in images if classes[other] != classes[image]]:
            partners[image] = stream.choice(others)
    return partners
