"""The group: workers run a call together, and what ends one of them ends the call with its reason."""

import pytest

from cluster.group import Group
from cluster.pool import Resources, WorkerDied
from tests.cluster.toys import until

import ray  # isort: skip  (cluster.pool protects it first)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("private_ray"), pytest.mark.timeout(300)]


def group(folder) -> Group:
    return Group("tests.cluster.toys:Ranks", {"offset": 10}, Resources(cpus=1, count=2), folder)


def wait_for_room() -> None:
    until(lambda: ray.available_resources().get("CPU", 0) == 2, "the cores were not given back")


def test_ranks_meet_and_the_first_ones_items_come_in_order(tmp_path):
    with group(tmp_path) as workers:
        assert list(workers.stream("count", 3)) == [{"step": step, "rank": 0, "sum": 21} for step in range(3)]
    wait_for_room()


@pytest.mark.parametrize("bad_rank", [0, 1])
def test_what_a_worker_raises_is_raised_here(tmp_path, bad_rank):
    with group(tmp_path) as workers, pytest.raises(RuntimeError, match=f"rank {bad_rank} cannot do step 1"):
        list(workers.stream("count", 3, bad_rank))
    wait_for_room()


def test_a_death_is_told_from_an_error(tmp_path):
    with group(tmp_path) as workers, pytest.raises(WorkerDied, match="Ranks died"):
        list(workers.stream("count", 3, 1, "die"))
    wait_for_room()


def test_who_stops_reading_ends_the_call(tmp_path):
    with group(tmp_path) as workers:
        stream = workers.stream("count", 10**9)
        assert next(stream)["step"] == 0
        stream.close()
    wait_for_room()
