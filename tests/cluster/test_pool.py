"""The pool: every item ends exactly once, whatever happens to the processes."""

import time
import traceback
from collections import Counter

import pytest
from ray.exceptions import OutOfMemoryError

import cluster.pool
from cluster.connection import room
from cluster.pool import ATTEMPTS, Outcome, Pool, Resources

pytestmark = [pytest.mark.usefixtures("private_ray"), pytest.mark.timeout(60)]  # a lost item shows as a hang
TOYS = "tests.cluster.toys"
TWO = Resources(cpus=1, count=2)


def pool_of(toy: str, resources: Resources = TWO, respawns: int = 16, **kwargs) -> Pool:
    return Pool(f"{TOYS}:{toy}", kwargs, resources, respawns)


def items(numbers, *more) -> list[tuple[int, tuple]]:
    return [(number, (number, *more)) for number in numbers]


def tries(folder) -> Counter:
    return Counter(int(path.stem) for path in folder.iterdir())


def test_every_item_once():
    with pool_of("Squares", offset=5) as pool:
        outcomes = list(pool.map("square", items(range(20))))
    assert sorted(outcomes, key=lambda outcome: outcome.key) == [Outcome(n, value=n * n + 5) for n in range(20)]


def test_who_waits_in_rays_queue_holds_no_gpu():
    """Two actors of two cores each, where there are two: the second has no place until the first is gone."""
    started = time.monotonic()
    with pool_of("Squares", Resources(cpus=2, count=2)) as pool:
        assert len(list(pool.map("process", items(range(8))))) == 8
        pool._resources = Resources(cpus=2, gpus=3, count=2)  # as if there were GPUs
    held = pool.gpu_seconds / 3
    assert 8 * 0.05 <= held < time.monotonic() - started


def test_no_items_need_no_actor():
    with Pool("no.such.module:Class", {}, TWO) as pool:
        assert list(pool.map("square", [])) == []


def test_work_is_spread_over_count_actors_which_the_next_map_uses_again():
    with pool_of("Squares") as pool:
        first = {outcome.value for outcome in pool.map("process", items(range(30)))}
        second = {outcome.value for outcome in pool.map("process", items(range(30)))}
        alone = pool.call("process")
    assert len(first) == 2
    assert second <= first and alone in first


def test_outcomes_come_while_others_are_still_to_do(tmp_path):
    with pool_of("Mortal", Resources(count=1), folder=str(tmp_path)) as pool:
        outcomes = pool.map("work", items(range(4)))
        assert next(outcomes) == Outcome(0, value=0)
        deadline = time.monotonic() + 20
        while len(tries(tmp_path)) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert tries(tmp_path) == Counter([0, 1])  # the worker has the next item while the caller looks at this one
        assert [outcome.key for outcome in outcomes] == [1, 2, 3]


def test_items_are_taken_in_the_order_given_and_a_second_try_comes_last(tmp_path):
    with pool_of("Mortal", Resources(count=1), folder=str(tmp_path), deadly=(0,)) as pool:
        outcomes = [outcome.key for outcome in pool.map("work", items([4, 0, 3, 1, 2]))]
    assert outcomes == [4, 3, 1, 2, 0]


def test_a_call_while_a_map_runs_takes_nothing_from_it():
    with pool_of("Squares") as pool:
        outcomes, calls = [], []
        for outcome in pool.map("square", items(range(8))):
            outcomes.append(outcome)
            calls.append(pool.call("square", outcome.key + 100))
    assert sorted(outcomes, key=lambda outcome: outcome.key) == [Outcome(n, value=n * n) for n in range(8)]
    assert calls == [(outcome.key + 100) ** 2 for outcome in outcomes]


def test_a_map_that_was_left_is_not_mixed_with_the_next():
    with pool_of("Squares") as pool:
        next(pool.map("square", items(range(8))))
        with pytest.raises(RuntimeError, match="last map was not read to its end"):
            list(pool.map("square", items(range(3))))


def test_actors_that_find_no_room_hold_up_nobody(tmp_path):
    with pool_of("Meets", Resources(count=5)) as pool:  # there are two cores
        outcomes = list(pool.map("meet", items(range(30), str(tmp_path), 2)))
    assert [outcome.error for outcome in outcomes] == [None] * 30
    assert len({outcome.value for outcome in outcomes}) == 2


@pytest.mark.parametrize(("cpus", "fit"), [(0.5, 4), (1, 2), (2, 1)])
def test_auto_is_as_many_actors_as_fit(tmp_path, cpus, fit):
    assert room(cpus, 0) == fit
    with pool_of("Meets", Resources(cpus=cpus, count="auto")) as pool:
        outcomes = list(pool.map("meet", items(range(fit), str(tmp_path), fit)))
    assert len({outcome.value for outcome in outcomes}) == fit and not any(outcome.error for outcome in outcomes)


def test_items_whose_process_was_killed_are_done_by_another(tmp_path):
    deadly = (3, 7, 8, 15)
    with pool_of("Mortal", folder=str(tmp_path), deadly=deadly) as pool:
        outcomes = list(pool.map("work", items(range(16))))
    assert Counter(outcome.key for outcome in outcomes) == Counter(range(16))
    assert {outcome.key: outcome.value for outcome in outcomes} == {n: n * 10 for n in range(16)}
    assert {outcome.key for outcome in outcomes if outcome.attempts > 1} == set(deadly)
    assert tries(tmp_path) == Counter(range(16)) + Counter(deadly)


def test_an_item_that_kills_every_worker_is_reported_and_the_rest_completes(tmp_path):
    with pool_of("Mortal", folder=str(tmp_path), deadly=(2,), every_try=True) as pool:
        outcomes = {outcome.key: outcome for outcome in pool.map("work", items(range(6)))}
    poison = outcomes.pop(2)
    assert (poison.value, poison.attempts) == (None, ATTEMPTS) and ATTEMPTS == 3
    assert "its worker died" in poison.error and "\n" not in poison.error
    assert {key: outcome.value for key, outcome in outcomes.items()} == {n: n * 10 for n in (0, 1, 3, 4, 5)}
    assert tries(tmp_path)[2] == 3


def test_a_worker_that_ray_killed_for_its_memory_is_replaced(monkeypatch):
    # Ray's memory monitor raises OutOfMemoryError, which is no RayActorError (seen with a low memory_usage_threshold).
    real, killed = cluster.pool.ray.get, []

    def get(ref):
        value = real(ref)
        if value == 9 and not killed:
            killed.append(ref)
            raise OutOfMemoryError("1 worker(s) were killed due to the node running low on memory.")
        return value

    monkeypatch.setattr(cluster.pool.ray, "get", get)
    with pool_of("Squares", respawns=1) as pool:
        outcomes = {outcome.key: outcome for outcome in pool.map("square", items(range(5)))}
    assert len(killed) == 1
    assert outcomes == {n: Outcome(n, value=n * n, attempts=2 if n == 3 else 1) for n in range(5)}


def test_an_item_that_raises_is_tried_three_times_by_a_worker_that_lives_on():
    with pool_of("Errs", Resources(count=1)) as pool:
        before = pool.call("process")
        outcomes = {o.key: o for o in pool.map("work", [(1, (1, 3)), (2, (2, 4)), (3, (3, 1))])}
        assert pool.call("process") == before
    assert outcomes[1] == Outcome(1, value=1, attempts=3)
    assert outcomes[2] == Outcome(2, error="ValueError: item 2 is odd", attempts=3)
    assert outcomes[3] == Outcome(3, value=3)


@pytest.mark.parametrize("use", ["map", "call", "stream"])
def test_a_constructors_mistake_is_raised_as_it_is(use):
    refusal = pytest.raises(ValueError, match="No checkpoint at '/no/where': give a folder")
    with pool_of("Refuses", path="/no/where") as pool, refusal as caught:
        list(pool.map("work", items([1]))) if use == "map" else list(getattr(pool, use)("work"))
    assert type(caught.value) is ValueError
    with pool_of("Squares", Resources(cpus=2)) as pool:  # the refusing actor's core is free, though `caught` lives
        assert pool.call("square", 3) == 9
    assert "toys.py" in "".join(traceback.format_exception(caught.value))  # the worker's own lines, for debugging


def test_workers_that_keep_dying_end_the_pool(tmp_path):
    giving_up = pytest.raises(RuntimeError, match=r"Workers of tests\.cluster\.toys:Stillborn keep dying")
    with pool_of("Stillborn", Resources(count=1), respawns=2, folder=str(tmp_path)) as pool, giving_up:
        list(pool.map("work", items(range(4))))
    assert len(list(tmp_path.iterdir())) == 3  # the first and two replacements


def test_the_cap_is_on_deaths_in_a_row(tmp_path):
    deadly = (0, 2, 4, 6, 8, 9)
    with pool_of("Mortal", Resources(count=1), respawns=1, folder=str(tmp_path), deadly=deadly) as pool:
        outcomes = pool.map("work", items(range(12)))
        assert [next(outcomes).key for _ in range(4)] == [1, 3, 5, 7]  # a death before each of them
        with pytest.raises(RuntimeError, match="keep dying"):  # 8 and 9
            next(outcomes)


def test_the_second_and_third_tries_of_several_poison_items_are_no_row(tmp_path):
    """They come last, one after another: six deaths, where three in a row of first tries would end the pool."""
    deadly = (0, 2, 4)
    with pool_of("Mortal", Resources(count=1), 2, folder=str(tmp_path), deadly=deadly, every_try=True) as pool:
        outcomes = {outcome.key: outcome for outcome in pool.map("work", items(range(6)))}
    assert {key: outcome.value for key, outcome in outcomes.items() if not outcome.error} == {1: 10, 3: 30, 5: 50}
    assert {key for key, outcome in outcomes.items() if outcome.attempts == ATTEMPTS} == set(deadly)


def test_actors_that_die_together_do_not_end_the_pool(tmp_path):
    """As when their node dies: the deaths of actors that worked are no row of failed replacements."""
    with pool_of("Mortal", TWO, respawns=1, folder=str(tmp_path), deadly=(0, 1)) as pool:
        outcomes = {outcome.key: outcome for outcome in pool.map("work", items(range(2)))}
    assert outcomes == {n: Outcome(n, value=n * 10, attempts=2) for n in range(2)}


def test_a_stream_yields_as_its_worker_does(tmp_path):
    with pool_of("Streams", Resources(count=1)) as pool:
        seen = []
        for step in pool.stream("steps", str(tmp_path), 4):
            seen.append(step)
            (tmp_path / str(step)).touch()  # the worker waits for this before it yields the next
        assert seen == [0, 1, 2, 3]


def test_a_streams_error_is_raised_after_what_it_yielded():
    with pool_of("Streams", Resources(count=1)) as pool:
        before, seen = pool.call("process"), []
        with pytest.raises(ValueError, match="the batch does not fit") as caught:
            for item in pool.stream("fails", 2):
                seen.append(item)
        assert type(caught.value) is ValueError and seen == [0, 1]
        assert pool.call("process") == before


def test_a_stream_whose_worker_dies_says_so_and_the_pool_goes_on(tmp_path):
    with pool_of("Mortal", Resources(count=1), folder=str(tmp_path)) as pool:
        with pytest.raises(RuntimeError, match=r"The worker running .*Mortal\.stream died"):
            list(pool.stream("stream", 2))
        assert pool.call("work", 4) == 40


def test_leaving_the_pool_frees_its_cores():
    everything = Resources(cpus=2, count=1)
    for _ in range(2):  # the second would wait for ever if the first still held both cores
        with pool_of("Squares", everything) as pool:
            assert pool.call("square", 3) == 9
