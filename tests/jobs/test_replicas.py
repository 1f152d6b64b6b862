"""What a replica is told about its GPUs and the memory of its machine."""

import pytest

import cluster.connection
import cluster.pool
from jobs.core.options import load_config
from jobs.core.run import Run
from jobs.core.workers import Workers


@pytest.mark.parametrize("gpus", [0.5, 2.0])
def test_replicas_know_their_share(tmp_path, monkeypatch, gpus):
    """What Ray is asked for and what the model is loaded with are one number; other workers have one whole GPU."""
    asked = []
    monkeypatch.setattr(Workers, "connect", lambda _: None)
    monkeypatch.setattr(cluster.connection, "room", lambda *_: 4)
    monkeypatch.setattr(cluster.pool, "Pool", lambda *args, **kwargs: asked.append(args))
    overrides = [("run_dir", str(tmp_path)), ("replicas.gpus", str(gpus)), ("replicas.count", "2")]
    with Run(load_config(None, overrides)) as run:
        run.sources.note_seen(run.base_model())
        run.workers.replicas(run.model_spec(run.base_model()))
        assert run.model_spec(run.base_model()).gpus == 1
    _, kwargs, resources = asked[0][:3]
    assert kwargs["spec"].sharers == 1
    assert kwargs["spec"].gpus == resources.gpus == gpus


@pytest.mark.parametrize(
    ("count", "cores", "beside", "sharers"),
    [
        ("auto", [4, 16], False, 8),
        ("3", [16], False, 3),
        ("16", [4, 4], False, 2),
        ("1", [16], True, 8),
        ("5", [], False, 5),
    ],
)
def test_replicas_without_gpus_know_who_shares_their_machine(tmp_path, monkeypatch, count, cores, beside, sharers):
    """Of two cores each: as many as the largest node holds, or the count; in a search others have replicas there."""
    asked = []
    monkeypatch.setattr(Workers, "connect", lambda _: None)
    monkeypatch.setattr(cluster.connection, "is_private", lambda: False)
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": {"CPU": number}} for number in cores])
    monkeypatch.setattr(cluster.pool, "Pool", lambda *args, **kwargs: asked.append(args))
    config = load_config(None, [("run_dir", str(tmp_path)), ("replicas.cpus", "2"), ("replicas.count", count)])
    with Run(config, beside_others=beside) as run:
        run.sources.note_seen(run.base_model())
        run.workers.replicas(run.model_spec(run.base_model()))
    assert asked[0][1]["spec"].sharers == sharers
