"""Drawing calibration questions: places in a list, from a seed. numpy only."""

from collections.abc import Sequence

import numpy as np


def draw_calibration(images: Sequence[str], samples: int, seed: int, per_image: int | None = None) -> list[int]:
    """Return places of `samples` questions (fewer where there are no more), given the image of each, in their order.

    per_image: draw images, and at most so many questions about each; None: draw questions one by one.
    """
    random = np.random.default_rng(seed)
    shuffled = random.permutation(len(images)).tolist()
    if per_image is not None:
        asked: dict[str, list[int]] = {}
        for i in shuffled:
            asked.setdefault(images[i], []).append(i)
        turns = random.permutation(sorted(asked)).tolist()  # any image is as likely as another
        shuffled = [i for image in turns for i in asked[image][:per_image]]
    return sorted(shuffled[:samples])


def draw_places(count: int, samples: int, seed: int) -> list[int]:
    """Return `samples` of the places 0 to count - 1 (all where there are no more), each once, in a random order."""
    return np.random.default_rng(seed).permutation(count)[:samples].tolist()
