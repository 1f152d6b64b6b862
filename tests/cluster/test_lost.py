"""A cluster that is lost: who does not answer, how long that is borne, and what a job says of it."""

import socket

from cluster import lost
from cluster.lost import Watch
from jobs.core.command import explain


def test_a_head_may_come_back_and_a_raylet_may_not(monkeypatch):
    monkeypatch.setattr(lost, "_watches", [])
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        head, raylet = (Watch([("its head", "127.0.0.1", port, seconds)]) for seconds in (30.0, 0.0))
        assert [head.look(), raylet.look()] == [False, False]
        assert lost.reason() is None and explain(KeyError("ours")) is None
    assert [head.look(), raylet.look()] == [False, True]
    assert head.missing == "its head"
    over = Watch([("its head", "127.0.0.1", port, 0.0)])
    over.stop()
    assert over.look() and over.missing is None, "a cluster that ends after the work was called lost"
    monkeypatch.setattr(lost, "_watches", [raylet])
    message = "The Ray cluster was lost: its head does not answer."
    assert str(lost.reason()).startswith(message) and str(explain(KeyError("Ray's"))).startswith(message)
