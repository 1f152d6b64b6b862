"""Units of work whose broken questions are found one by one."""

from collections import Counter

from actors.specs import Sample
from cluster.pool import Outcome
from jobs.core.units import in_units, whole_images


class Pool:
    """Doubles numbers; a call that holds 3 fails."""

    def __init__(self):
        self.calls: list[tuple] = []

    def map(self, method, items):
        for key, (numbers, offset) in items:
            self.calls.append((method, *numbers))
            if 3 in numbers:
                yield Outcome(key, error="ValueError: three", attempts=3)
            else:
                yield Outcome(key, value=[2 * number + offset for number in numbers])


def test_only_the_broken_question_is_left_out(capsys):
    pool = Pool()
    found = list(in_units(pool, "double", [[1, 2], [3, 4], [5]], lambda unit: (unit, 1), "units"))
    assert [(unit, outcome.value) for unit, outcome in found if not outcome.error] == [
        ([1, 2], [3, 5]),
        ([5], [11]),
        ([4], [9]),
    ]
    assert [(unit, outcome.error) for unit, outcome in found if outcome.error] == [([3], "ValueError: three")]
    assert Counter(pool.calls) == Counter([("double", *n) for n in ((1, 2), (3, 4), (5,), (3,), (4,))])
    shown = capsys.readouterr().err
    assert "units: 3/3 done" in shown and "units, one by one: 2/2 done" in shown


def test_a_unit_of_one_is_not_tried_again(capsys):
    pool = Pool()
    ((unit, outcome),) = in_units(pool, "double", [[3]], lambda unit: (unit, 0), "units")
    assert (unit, outcome.attempts, len(pool.calls)) == ([3], 3, 1)
    assert "one by one" not in capsys.readouterr().err


def test_units_hold_whole_images():
    """Images with 3, 2, 1 and 5 questions, at most four a unit: only the last image is parted."""
    samples = [
        Sample(f"{image}{i}", image, "?")
        for image, count in zip("abcd", (3, 2, 1, 5), strict=True)
        for i in range(count)
    ]
    units = [[sample.id for sample in unit] for unit in whole_images(samples, 4)]
    assert units == [["a0", "a1", "a2"], ["b0", "b1", "c0"], ["d0", "d1", "d2", "d3"], ["d4"]]
    assert [len(unit) for unit in whole_images(samples, 1)] == [1] * 11 and whole_images([], 4) == []
