"""The judge's loop keeps an engine of known speed busy."""

import pytest

from tests.benchmarks.judge_loop import whole


@pytest.mark.slow
def test_the_loop_reaches_the_engines_speed():
    """64 calls at a time of half a second each are 128 verdicts per second; probe and last calls count, too."""
    whole(64, 64, 0.0)  # the warm-up
    seconds, _ = whole(3840, 64, 0.5)
    assert 3840 / seconds >= 0.95 * 64 / 0.5
