"""The metering of workers: whose GPU seconds are whose."""

from dataclasses import dataclass

import pytest

import cluster.connection
import cluster.pool
from jobs.core.options import load_config
from jobs.core.run import Run
from jobs.core.stage import Stage
from jobs.core.workers import Workers


@dataclass
class FakePool:
    """Holds as many GPU seconds as its target says."""

    target: str
    kwargs: dict
    resources: object

    @property
    def gpu_seconds(self) -> float:
        return float(self.target)


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(Workers, "connect", lambda _: None)
    monkeypatch.setattr(cluster.connection, "capacity", lambda: (8, 0))
    monkeypatch.setattr(cluster.connection, "largest_node", lambda: 2)
    monkeypatch.setattr(cluster.pool, "Pool", FakePool)
    return Run(load_config(None, [("run_dir", str(tmp_path))]))


def stage(kind: str, *builds) -> Stage:
    def build(run, folder, facts):
        for step in builds:
            step(run)

    return Stage(kind, 1, {}, (), build)


def host(seconds: float):
    return lambda run: run.workers.worker(str(seconds))


def test_a_stage_that_makes_another_meanwhile_keeps_its_seconds(run):
    inner = stage("inner", host(3), host(4))
    outer = stage("outer", host(5), lambda run: run.make(inner), host(0.5))
    run.make(outer)
    assert run.facts(outer)["gpu_seconds"] == 5.5
    assert run.facts(inner)["gpu_seconds"] == 7


def test_seconds_of_a_failed_stage_are_not_the_next_ones(run):
    broken = stage("broken", host(3), lambda run: run.source("/nowhere/at/all", "model.path"))
    with pytest.raises(ValueError, match="nowhere"):
        run.make(broken)
    sound = stage("sound", host(1))
    run.make(sound)
    assert run.facts(sound)["gpu_seconds"] == 1
    run.workers.worker("9")  # beside all stages: measured by nobody, refused by nobody
