"""Machines come and go, GPUs are shared out, processes are killed: nothing is lost, done twice or left waiting."""

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from cluster.connection import _room_on
from cluster.tables import read_table
from tests.cluster.scenarios import UNITS
from tests.cluster.toys import Digests

REPOSITORY = Path(__file__).resolve().parents[2]


def start(*scenario: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.cluster.scenarios", *scenario]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def result(process: subprocess.Popen, timeout_s: float = 120):
    output, errors = process.communicate(timeout=timeout_s)
    assert process.returncode == 0, errors
    return json.loads(output.splitlines()[-1])


def by(field: str, rows: list[dict]) -> dict:
    groups = defaultdict(list)
    for row in rows:
        groups[row[field]].append(row)
    return groups


def assert_once(rows: list[dict], count: int) -> None:
    assert Counter(row["key"] for row in rows) == Counter(range(count))
    assert {row["error"] for row in rows} == {None}


@pytest.mark.parametrize(
    ("node", "cpus", "gpus", "fit"),
    [
        ({"CPU": 8.0, "GPU": 2.0}, 1, 1, 2),
        ({"CPU": 8.0, "GPU": 2.0}, 1, 0.5, 4),
        ({"CPU": 8.0, "GPU": 2.0}, 1, 0.4, 4),  # not 5: a replica is on one GPU
        ({"CPU": 8.0, "GPU": 1.0}, 0.1, 0.1, 10),
        ({"CPU": 3.0, "GPU": 8.0}, 2, 2, 1),
        ({"CPU": 3.0}, 2, 0, 1),
        ({"GPU": 2.0}, 1, 1, 0),
        ({"CPU": 8.0}, 1, 1, 0),
    ],
)
def test_what_a_node_holds(node, cpus, gpus, fit):
    assert _room_on(node, cpus, gpus) == fit


@pytest.mark.timeout(120)
@pytest.mark.slow
def test_every_gpu_has_its_replicas_and_none_is_idle_while_units_wait():
    found = result(start("devices"))
    assert_once(found["whole"], 40)
    assert_once(found["half"], 40)
    devices = by("devices", found["whole"])
    assert set(devices) == {"0", "1"}
    assert [len({row["process"] for row in rows}) for rows in devices.values()] == [1, 1]
    assert {len({row["process"] for row in rows}) for rows in by("devices", found["half"]).values()} == {2}
    assert set(by("devices", found["half"])) == {"0", "1"}
    for rows in (found["whole"], found["half"]):
        began, no_more_wait = min(row["began"] for row in rows), max(row["began"] for row in rows)
        for own in by("process", rows).values():
            busy = sum(min(row["ended"], no_more_wait) - row["began"] for row in own)
            assert busy > 0.75 * (no_more_wait - began)


@pytest.mark.timeout(120)
@pytest.mark.slow
def test_units_move_to_nodes_that_join_and_survive_nodes_that_are_lost():
    found = result(start("nodes"))
    assert_once(found["rows"], 60)
    first, second, third = (by("node", found["rows"])[node] for node in found["nodes"])
    assert len(first) + len(second) + len(third) == 60 and len(first) >= 3 and len(second) >= 16
    assert max(row["began"] for row in first) > min(row["began"] for row in second)  # both worked at one time
    assert [len({row["process"] for row in rows}) for rows in (first, second, third)] == [1, 2, 2]
    again = [row for row in found["rows"] if row["attempts"] > 1]
    assert 1 <= len(again) <= 3 and not any(row in first for row in again)  # what was in flight, and no more


@pytest.mark.timeout(120)
@pytest.mark.slow
def test_actors_that_were_asked_for_start_when_there_is_room():
    found = result(start("asked_for"))
    assert_once(found["rows"], 200)
    first, second = (by("node", found["rows"])[node] for node in found["nodes"])
    assert len({row["process"] for row in first}) == 1 and len({row["process"] for row in second}) == 2


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_a_gpu_belongs_to_the_stage_that_needs_it_and_not_to_its_trial():
    process = start("trials")
    try:
        found = result(process, timeout_s=200)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # its Ray is to end, too
        process.communicate(timeout=60)
        pytest.fail("the trials wait for each other")
    assert found["errors"] == dict.fromkeys("abc")
    rows = found["rows"]
    assert {name: row["devices"] for name, row in rows.items()} == {
        "a-gpu": "0", "b-gpu": "0", "a-cpu": "", "b-cpu": "", "c-cpu": ""
    }  # fmt: skip
    assert rows["a-gpu"]["ended"] < rows["b-gpu"]["began"]
    for gpu, others in (("a-gpu", ("b-cpu", "c-cpu")), ("b-gpu", ("a-cpu",))):
        for other in others:
            assert rows[other]["began"] < rows[gpu]["ended"] and rows[gpu]["began"] < rows[other]["ended"]


class Victims:
    """The processes of a driver and its private Ray, found while it lives."""

    def __init__(self, driver: subprocess.Popen):
        self._driver = psutil.Process(driver.pid)
        self._seen: dict[psutil.Process, str] = {}

    def workers(self) -> list[psutil.Process]:
        """Return the actors' processes."""
        self._seen.update({process: _title(process) for process in self._driver.children(recursive=True)})
        return [process for process in self._seen if process.is_running() and _is_actor(_title(process))]

    def survivors(self, which: Callable[[str], bool], timeout_s: float) -> list[str]:
        """Return what still runs so many seconds after the driver's end."""
        chosen = [process for process, title in self._seen.items() if which(title)]
        assert chosen
        return [self._seen[process] for process in psutil.wait_procs(chosen, timeout_s)[1]]

    def remove_folder(self) -> None:
        """Remove what a killed driver cannot remove."""
        for folder in {name for title in self._seen.values() for name in re.findall(r"/tmp/prn-\w+", title)}:
            shutil.rmtree(folder, ignore_errors=True)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def _is_actor(title: str) -> bool:
    return title.startswith("ray::_Host")


def kill_workers(driver: subprocess.Popen, units: Path, until: int, draw: random.Random) -> tuple[Victims, int]:
    """Kill a worker every second until so many units are finished; return the processes, and how many were killed."""
    victims, killed = Victims(driver), 0
    while driver.poll() is None and len(list(units.glob("[0-9]*.parquet"))) < until:
        workers = victims.workers()
        if len(workers) > 1:
            draw.choice(workers).kill()
            killed += 1
        time.sleep(draw.uniform(0.7, 1.3))
    return victims, killed


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_killed_workers_and_a_killed_driver_cost_nothing_but_time(tmp_path):
    draw, units = random.Random(8), tmp_path / "units"
    driver = start("digests", str(tmp_path))
    first, killed = kill_workers(driver, units, UNITS // 2, draw)
    assert first.workers() and driver.poll() is None
    driver.kill()
    driver.communicate()
    assert first.survivors(_is_actor, 10) == []
    finished = len(list(units.glob("[0-9]*.parquet")))
    assert UNITS // 2 <= finished < UNITS

    driver = start("digests", str(tmp_path))
    second, killed_too = kill_workers(driver, units, UNITS, draw)
    assert result(driver) == UNITS - finished
    assert second.survivors(bool, 10) == []
    assert first.survivors(bool, 90) == []  # Ray's agents look for their cluster for a minute
    first.remove_folder()

    rows = [row for path in units.glob("[0-9]*.parquet") for row in read_table(path)]
    assert_once(rows, UNITS)
    assert {row["key"]: row["value"] for row in rows} == {n: Digests().digest(n) for n in range(UNITS)}
    logged = Counter((tmp_path / "log").read_text().split())
    assert set(logged.values()) == {1} and UNITS - len(logged) <= 1  # the driver may have died before it could log
    assert killed >= 2 and killed_too >= 2 and any(row["attempts"] > 1 for row in rows)
