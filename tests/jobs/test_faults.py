"""The ablation while its processes are killed: nothing is lost, nothing is measured twice, nothing changes."""

import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from cluster.tables import read_table
from tests.jobs.commands import ROOT, options, run

UNITS = 360
WORK = {
    "data.draw_per_class": "20",
    "ablate.samples": str(UNITS),
    "ablate.unit": "1",
    "ablate.candidates": "all",
    "ablate.compare": "[]",
    "replicas.count": "2",
}
KILL_EVERY = (30, 80)  # units, not seconds: a busy machine starts replicas slower than a clock would kill them


def start(folder: Path) -> subprocess.Popen:
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "jobs.ablate", "--config", "configs/derm-tiny.yaml", *options(folder, **WORK)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def parts(folder: Path) -> list[Path]:
    return list(folder.glob("measurements/answers-*/*.parquet"))


def replicas(driver: subprocess.Popen) -> list[psutil.Process]:
    try:
        below = psutil.Process(driver.pid).children(recursive=True)
        return [process for process in below if any("_Host" in word for word in process.cmdline())]
    except psutil.Error:
        return []


def rows(folder: Path) -> dict:
    found = [row for part in parts(folder) for row in read_table(part)]
    keys = Counter((row["sample_id"], tuple(row["removed"])) for row in found)
    assert set(keys.values()) == {1}, "a key was measured twice"
    return {(row["sample_id"], tuple(row["removed"])): (row["answer"], row["loss"]) for row in found}


@pytest.mark.slow
def test_sigkilled_replicas_and_driver_change_nothing(tmp_path):
    calm, stormy = tmp_path / "calm", tmp_path / "stormy"
    assert run("ablate", *options(calm, **WORK)).returncode == 0
    chance, kills, driver, log = random.Random(7), 0, start(stormy), b""
    driver_killed, next_kill = False, chance.randint(*KILL_EVERY)
    while driver.poll() is None:
        time.sleep(0.05)
        if not driver_killed and len(parts(stormy)) > UNITS // 2:
            driver.kill()
            driver.communicate()
            before = {path.name: path.stat().st_mtime_ns for path in parts(stormy)}
            driver_killed, driver = True, start(stormy)
        elif len(parts(stormy)) > next_kill and (victims := replicas(driver)):
            chance.choice(victims).kill()
            kills += 1
            next_kill = len(parts(stormy)) + chance.randint(*KILL_EVERY)
    log = driver.communicate()[0].decode()
    assert driver.returncode == 0, log
    assert driver_killed and kills >= 3, (driver_killed, kills)
    assert len(before) < UNITS, "the driver was not killed in the middle"
    after = {path.name: path.stat().st_mtime_ns for path in parts(stormy)}
    assert all(after[name] == stamp for name, stamp in before.items()), "a finished unit was measured again"
    expected, found = rows(calm), rows(stormy)
    assert len(expected) == UNITS * 11 and set(found) == set(expected)
    assert {key: answer for key, (answer, _) in found.items()} == {key: answer for key, (answer, _) in expected.items()}
    for key, (_, loss) in found.items():  # which texts are embedded together changes the last digits
        assert loss == pytest.approx(expected[key][1], abs=1e-6)
    for one, other in zip(scores(stormy), scores(calm), strict=True):
        floats = ("loss", "score", "low", "high")
        assert one == {**other, **{name: pytest.approx(other[name], abs=1e-6) for name in floats}}


def scores(folder: Path) -> list[dict]:
    (table,) = folder.glob("artifacts/ablate-*/scores.parquet")
    return read_table(table)
