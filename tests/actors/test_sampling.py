"""Calibration questions are drawn from a seed."""

import random

import numpy as np
import pytest

from actors.maths.sampling import draw_calibration, draw_partners, draw_places


@pytest.mark.parametrize(
    ("samples", "per_image", "questions", "images"),
    [(6, None, 6, None), (99, None, 20, 4), (6, 3, 6, 2), (7, 3, 7, 3), (99, 3, 12, 4), (3, 1, 3, 3), (6, 9, 6, 2)],
)
def test_questions_are_drawn_one_by_one_or_by_image(samples, per_image, questions, images):
    """Of four images with five questions each; in their order, each once, others with another seed."""
    given = [image for image in "abcd" for _ in range(5)]
    picks = draw_calibration(given, samples, 1, per_image)
    assert picks == sorted(set(picks)) and len(picks) == questions
    assert images is None or len({given[i] for i in picks}) == images
    assert samples == 99 or picks != draw_calibration(given, samples, 2, per_image)


def test_a_seed_draws_the_same_for_ever():
    """What runs that are there were calibrated with: numpy's stream of seed 0."""
    assert draw_calibration(list("aabbccdd"), 3, 0) == sorted(np.random.default_rng(0).permutation(8)[:3].tolist())
    assert draw_places(8, 3, 0) == np.random.default_rng(0).permutation(8)[:3].tolist()


def test_places_are_drawn_once_each():
    assert sorted(draw_places(5, 99, 3)) == list(range(5))
    assert len(draw_places(50, 7, 3)) == len(set(draw_places(50, 7, 3))) == 7
    assert draw_places(50, 7, 3) != draw_places(50, 7, 4)


def test_partners_are_of_another_class():
    """In the order of their names, by Python's stream of the seed; without another class there is none."""
    classes = {"d": "x", "a": "x", "b": "y", "c": "z"}
    found = draw_partners(classes, 4)
    assert all(classes[image] != classes[other] for image, other in found.items())
    stream = random.Random(4)
    assert found == {
        image: stream.choice(others) for image, others in zip("abcd", ("bc", "acd", "abd", "bc"), strict=True)
    }
    assert draw_partners({"a": "x", "b": "x"}, 4) == {}
