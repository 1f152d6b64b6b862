"""What a replica is told about its GPUs."""

import pytest

import cluster.connection
import cluster.pool
from jobs.options import load_config
from jobs.run import Run


@pytest.mark.parametrize("gpus", [0.5, 2.0])
def test_replicas_know_their_share(tmp_path, monkeypatch, gpus):
    """What Ray is asked for and what the model is loaded with are one number; other workers have one whole GPU."""
    asked = []
    monkeypatch.setattr(Run, "_connect", lambda _: None)
    monkeypatch.setattr(cluster.connection, "room", lambda *_: 4)
    monkeypatch.setattr(cluster.pool, "Pool", lambda *args, **kwargs: asked.append(args))
    overrides = [("run_dir", str(tmp_path)), ("replicas.gpus", str(gpus)), ("replicas.count", "2")]
    with Run(load_config(None, overrides)) as run:
        run.replicas(run.base_model())
        assert run.model_spec(run.base_model()).gpus == 1
    _, kwargs, resources = asked[0][:3]
    assert kwargs["spec"].gpus == resources.gpus == gpus
