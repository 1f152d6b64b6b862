"""The efficiency protocol's arithmetic (run_times, summary and merged: test_profiler)."""

from actors.maths.latency import cover_time


def test_time_in_which_something_was_being_made():
    """0 to 5 by two spans that overlap, 10 to 15 by one that holds another, and 20 to 21."""
    assert cover_time([(10, 5), (0, 4), (3, 2), (11, 1), (20, 1)]) == 5 + 5 + 1
    assert cover_time([]) == 0
