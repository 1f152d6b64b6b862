"""A search while its driver, a trial and a worker are killed: the same table, and no finished stage again."""

import json
import math
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from cluster.head import Head, private_head
from jobs.searching.rows import MEASURED
from tests.jobs.commands import ROOT, SMALL

WORK = {
    **SMALL,
    "ablate.compare": "[]",
    "evaluate.controls": "false",
    "search.depths": "[2]",
    "search.recoveries": "[none, lora]",
    "search.quantizers": "[none, rtn]",
    "search.screen_images": "4",
    "replicas.count": "auto",  # as many stages at a time as there are cores
}
FEW = ("--search.depths", "[0]", "--search.recoveries", "[none]")
TRIAL, WORKER = "ray::Implicit", "ray::_Host.call"  # how the processes of trials and of stages are called
UNEQUAL = ("command", "process_peak_gib", *MEASURED)


def start(folder: Path, images: Path, *more: str, head: Head | None = None) -> subprocess.Popen:
    """Start a search in `folder`; both searches draw their images to one place, which names the artifacts."""
    chosen = {"run_dir": str(folder), "data.root": str(images), **WORK}
    words = [word for key, value in chosen.items() for word in (f"--{key}", value)]
    command = [sys.executable, "-m", "jobs.search", "--config", "configs/derm-tiny-search.yaml", *words, *more]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    if head:
        environment |= {**head.environment, "RAY_ADDRESS": head.gcs}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def rows(folder: Path) -> list[dict]:
    found = json.loads((folder / "search" / "rows.json").read_text())
    return [{key: value for key, value in row.items() if key not in UNEQUAL} for row in found]


def same(one, other) -> bool:
    """Tell whether two values are equal, numbers but for their last digits: the embedder's batches change these."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6)
    return bool(one == other)


def log(folder: Path) -> list[dict]:
    path = folder / "search" / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def made(folder: Path) -> list[str]:
    return [line["name"] for line in log(folder) if line["event"] == "made"]


def finished(folder: Path) -> dict[str, int]:
    """Return when each artifact was finished (ns); one that is made again is younger."""
    return {path.parent.name: path.stat().st_mtime_ns for path in (folder / "artifacts").glob("*/manifest.json")}


def kill_one(driver: subprocess.Popen, title: str, draw: random.Random) -> bool:
    """Kill a process below the driver whose title begins so, if there is one."""
    try:
        below = [p for p in psutil.Process(driver.pid).children(recursive=True) if p.name().startswith(title)]
        if below:
            draw.choice(below).kill()
        return bool(below)
    except psutil.Error:
        return False


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_search_that_is_killed_goes_on_to_the_same_table(tmp_path):
    calm, stormy, images = tmp_path / "calm", tmp_path / "stormy", tmp_path / "images"
    driver = start(calm, images)
    output = driver.communicate()[0].decode()
    assert driver.returncode == 0, output
    count = len(made(calm))
    assert len(set(made(calm))) == count == len(list((calm / "artifacts").glob("*/manifest.json")))
    kinds = Counter(name.partition("-")[0] for name in made(calm))
    assert (kinds["prune"], kinds["recover"], kinds["quantize"]) == (1, 1, 2)

    draw, seen, hits, kept = random.Random(3), [], Counter(), {}
    for moment in sorted(draw.sample(range(2, count - 1), 3)):
        driver, left = start(stormy, images), [TRIAL, WORKER]
        while driver.poll() is None and len(made(stormy)) < moment:
            for title in [title for title in left if len(made(stormy)) > len(seen) and kill_one(driver, title, draw)]:
                left.remove(title)
                hits[title] += 1
            time.sleep(0.1)
        time.sleep(draw.uniform(0, 2))
        assert driver.poll() is None, driver.communicate()[0].decode()
        driver.kill()
        driver.communicate()
        seen, kept = made(stormy), finished(stormy) | kept
        assert len(seen) >= moment
    assert hits[TRIAL] >= 1 and hits[WORKER] >= 1
    driver = start(stormy, images, "--resume")
    output = driver.communicate()[0].decode()
    assert driver.returncode == 0, output
    assert max(Counter(made(stormy)).values()) == 1, "a finished stage was made again"
    assert kept and kept.items() <= finished(stormy).items(), "a finished stage was made again, and the log hides it"
    assert set(made(stormy)) <= set(made(calm)) and len(set(made(calm)) - set(made(stormy))) <= 3 * 2  # not logged yet
    assert [line for line in log(stormy) if line["event"] == "failed"] == []
    assert same(rows(stormy), rows(calm))
    assert "status" in output and "answer for no limit" in output


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_search_whose_head_is_killed_says_so_and_goes_on(tmp_path):
    folder, images = tmp_path / "run", tmp_path / "images"
    seen: list[str] = []
    for part in ("gcs_server", "raylet"):
        with private_head(2) as head:
            driver = start(folder, images, *FEW, head=head)
            while driver.poll() is None and len(made(folder)) == len(seen):
                time.sleep(0.1)
            seen = made(folder)
            below = [p for p in psutil.Process().children(recursive=True) if p.name() == part]
            (victim,) = [p for p in below if any(head.environment["RAY_TMPDIR"] in word for word in p.cmdline())]
            began = time.monotonic()
            victim.kill()
            output = driver.communicate(timeout=90)[0].decode()
        assert time.monotonic() - began < 60  # before Ray itself gives up
        assert driver.returncode == 1, output
        assert "Traceback" not in output
        assert output.splitlines()[-1].startswith("search: The Ray cluster was lost: "), output
        assert "the same command continues" in output.splitlines()[-1]
    with private_head(2) as head:
        driver = start(folder, images, *FEW, head=head)
        output = driver.communicate()[0].decode()
    assert driver.returncode == 0 and "answer for no limit" in output, output
    assert max(Counter(made(folder)).values()) == 1, "a finished stage was made again"
    assert [row["status"] for row in rows(folder)] == ["done", "done"]
    assert [line for line in log(folder) if line["event"] == "failed"] == []
