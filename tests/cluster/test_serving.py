"""Serving: calls end, whatever happens to the replicas; what is up goes with its block; nothing leaves this machine."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import httpx2
import psutil
import pytest
import ray
from ray import serve
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import RayServeException

import cluster.serving.left_overs
import cluster.serving.service
from cluster.serving.left_overs import end_left
from cluster.serving.service import TRIES, Scale, ServiceLost, application_name, send_with_retries, serve_class

pytestmark = [pytest.mark.usefixtures("serving"), pytest.mark.timeout(120)]
ROOT = Path(__file__).resolve().parents[2]
ECHO = "tests.cluster.serving_toys:Echo"
ONE, TWO = (Scale(cpus=1, gpus=0, replicas=n, max_replicas=n, at_once=16) for n in (1, 2))


@pytest.fixture(scope="module")
def serving(private_ray):
    """Serve on the private Ray, and nothing of it left for other tests."""
    yield
    serve.shutdown()


def echo(scale: Scale = ONE, sign: str = "#", **more):
    return serve_class("echo", ECHO, {"sign": sign}, scale, **more)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def applications() -> set[str]:
    return set(serve.status().applications)


def listening() -> set[str]:
    """Return the addresses on which this process's children listen."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        try:
            found |= {
                c.laddr.ip.removeprefix("::ffff:") for c in process.net_connections("inet") if c.status == "LISTEN"
            }
        except psutil.NoSuchProcess:
            pass
    return found


@pytest.mark.slow
def test_every_call_is_answered_though_a_replica_is_killed_and_the_application_goes_with_its_block():
    async def calls():
        async with echo(TWO) as service:
            processes = {await service.call("process", timeout=20) for _ in range(20)}
            inside = applications(), listening(), serve.status().proxies
            flights = [asyncio.create_task(service.call("slowly", n, 0.5, timeout=60)) for n in range(30)]
            await asyncio.sleep(0.3)
            os.kill(min(processes), signal.SIGKILL)
            answers = await asyncio.gather(*flights)
            with pytest.raises(KeyError, match="no such key"):
                await service.call("fail", "no such key", timeout=20)
            with pytest.raises(TimeoutError):
                await service.call("slowly", 1, 30.0, timeout=0.3)
            assert await service.call("slowly", 2, 0.0, timeout=20) == "#2"
            return service.name, processes, inside, answers

    name, processes, (names, addresses, proxies), answers = asyncio.run(calls())
    assert answers == [f"#{n}" for n in range(30)]
    assert len(processes) == 2 and names == {name}
    assert addresses == {"127.0.0.1"} and proxies == {}  # handle only, and no server beyond this machine
    assert applications() == set()


def test_what_is_kept_is_used_again_and_ends_with_a_block_that_does_not_keep_it(capsys):
    async def process(keep: bool) -> tuple[int, str]:
        async with echo(keep=keep) as service:
            return await service.call("process", timeout=20), service.name

    async def ends():
        async with echo() as service:
            assert service.name == name and await service.call("process", timeout=20) == first
            with pytest.raises(ValueError, match="without HTTP"):
                async with echo(port=free_port()):
                    pass
            serve.delete(service.name)
            async with asyncio.timeout(20):  # less than the call's own
                with pytest.raises(ServiceLost, match="is gone"):
                    while True:
                        await service.call("slowly", 3, 0.0, timeout=60)

    first, name = asyncio.run(process(keep=True))
    assert applications() == {name}
    assert "kept only as long as this Ray, which is private" in capsys.readouterr().err
    assert asyncio.run(process(keep=True)) == (first, name) and applications() == {name}
    asyncio.run(ends())
    assert applications() == set()


@pytest.mark.slow
def test_jobs_that_do_not_keep_it_have_one_each():
    async def names():
        async with echo() as one, echo() as other:
            return one.name, other.name, applications()

    one, other, both = asyncio.run(names())
    assert one != other and both == {one, other}


@pytest.mark.slow
def test_a_replica_whose_health_check_fails_is_replaced():
    async def calls():
        async with echo() as service:
            before = await service.call("process", timeout=20)
            await service.call("sicken", timeout=20)
            async with asyncio.timeout(60):
                while await service.call("process", timeout=60) == before:
                    await asyncio.sleep(0.1)

    asyncio.run(calls())


@pytest.mark.parametrize(
    ("kind", "error"), [("ValueError", ValueError), pytest.param("OSError", RuntimeError, marks=pytest.mark.slow)]
)
def test_an_object_that_cannot_be_built_says_why_and_leaves_nothing(kind, error):
    async def start():
        async with serve_class("bad", "tests.cluster.serving_toys:Refuses", {"kind": kind}, ONE):
            pass

    with pytest.raises(error, match="did not come up: the checkpoint is empty: no weights") as raised:
        asyncio.run(start())
    assert type(raised.value) is error and applications() == set()


@pytest.mark.slow
def test_a_start_that_is_given_up_leaves_nothing():
    async def start():
        async with asyncio.timeout(8), serve_class("slow", "tests.cluster.serving_toys:Slow", {}, ONE):
            pass

    with pytest.raises(TimeoutError):
        asyncio.run(start())
    assert applications() == set()


def test_no_room_is_said_at_once():
    async def start():
        async with echo(Scale(cpus=1, gpus=0, replicas=3, max_replicas=3, at_once=1)):
            pass

    with pytest.raises(ValueError, match=r"3 replica\(s\) of 1 cores and 0 GPUs are wanted; there are 2 cores"):
        asyncio.run(start())


def test_autoscaling_is_asked_for_where_the_limits_differ():
    options = Scale(cpus=1, gpus=0, replicas=1, max_replicas=3, at_once=16).options()
    assert "num_replicas" not in options and "max_queued_requests" not in options
    assert options["autoscaling_config"] == {"min_replicas": 1, "max_replicas": 3, "target_ongoing_requests": 8}
    assert serve.deployment(object, name="x", **options) is not None
    assert ONE.options()["num_replicas"] == 1 and "autoscaling_config" not in ONE.options()


def send_of(*ends):
    """Return a `send` that ends in these ways, one after the other, and the list of calls."""
    calls = []

    async def send():
        calls.append(len(calls))
        end = ends[min(len(calls), len(ends)) - 1]
        if isinstance(end, BaseException):
            raise end
        return end

    return send, calls


@pytest.fixture
def hurried(monkeypatch):
    monkeypatch.setattr(cluster.serving.service, "POLL_S", 0.0)


@pytest.mark.parametrize("death", [ActorDiedError(), RayServeException("replica is busy")])
def test_a_call_is_tried_again_a_few_times_and_then_lost(hurried, death):
    send, calls = send_of(death, death, "answer")
    assert asyncio.run(send_with_retries(send, "judge", 5)) == "answer" and len(calls) == 3
    send, calls = send_of(death)
    with pytest.raises(ServiceLost, match="judge"):
        asyncio.run(send_with_retries(send, "judge", 5))
    assert len(calls) == TRIES


def test_an_error_of_the_object_is_not_tried_again(hurried):
    send, calls = send_of(RayTaskError("call", "traceback", ValueError("odd")))
    with pytest.raises(ValueError, match="odd"):
        asyncio.run(send_with_retries(send, "judge", 5))
    assert len(calls) == 1


def test_what_a_dead_driver_left_is_ended(monkeypatch, capsys):
    """By the Ray job in the name: not what is kept, nor what a living job has, nor a job that nobody knows."""
    names = ["judge-0badc0de", "judge-1-job02000000-aaaaaa", "judge-1-job03000000-bbbbbb", "judge-1-job04000000-cccccc"]
    ended = []
    monkeypatch.setattr(serve, "status", lambda: SimpleNamespace(applications=dict.fromkeys(names)))
    monkeypatch.setattr(serve, "delete", ended.append)
    table = [{"JobID": "02000000", "IsDead": True}, {"JobID": "03000000", "IsDead": False}]
    monkeypatch.setattr(cluster.serving.left_overs, "jobs", lambda: table)
    end_left()
    assert ended == [names[1]] and f"{names[1]} was left by a job that has ended" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_drivers_application_is_ended_by_the_next_driver():
    script = """
import asyncio, os, signal, sys
from cluster.serving.service import Scale, serve_class
import ray
ray.init(address=sys.argv[1], log_to_driver=False)

async def killed():
    async with serve_class("left", "tests.cluster.serving_toys:Echo", {"sign": "#"}, Scale(1, 0, 1, 1, 4)) as service:
        print(service.name, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(killed())
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": ""}
    command = [sys.executable, "-c", script, ray.get_runtime_context().gcs_address]
    said = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=90)
    name = next(line for line in said.stdout.splitlines() if line.startswith("left-"))
    assert said.returncode == -signal.SIGKILL and name in applications()

    async def next_one() -> set[str]:
        async with echo():
            return applications()

    for _ in range(50):
        if next(job["IsDead"] for job in cluster.serving.left_overs.jobs() if job["JobID"] in name):
            break
        time.sleep(0.2)
    assert name not in asyncio.run(next_one())


def test_a_cluster_that_is_gone_does_not_take_the_results_along(monkeypatch, capsys):
    """What cannot be ended any more is told, not raised: it would hide the block's own error."""

    def raise_dead(*_):
        raise RayServeException("the controller is dead")

    for name in ("status", "delete", "shutdown"):
        monkeypatch.setattr(serve, name, raise_dead)
    cluster.serving.service._leave("judge-1", True)
    cluster.serving.service.shut_down()
    said = capsys.readouterr().err
    assert "judge-1 could not be ended" in said and "Ray Serve could not be ended" in said and "is dead" in said


def test_a_port_that_is_taken_is_told_at_once(monkeypatch):
    monkeypatch.setattr(cluster.serving.service, "is_running", lambda: False)

    async def start(port: int):
        async with echo(port=port):
            pass

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"127.0.0.1:{port} cannot be used .*: give another port"):
            asyncio.run(start(port))


def test_serve_that_does_not_start_says_so(monkeypatch):
    def slow(**_):
        raise TimeoutError("after 60 s")

    monkeypatch.setattr(serve, "start", slow)

    async def start():
        async with echo():
            pass

    with pytest.raises(RuntimeError, match=r"Ray Serve did not start .*after 60 s"):
        asyncio.run(start())


def test_a_long_wait_is_explained_now_and_then(hurried, monkeypatch, capsys):
    replica = SimpleNamespace(message="1 replica waits for a node with 4 GPUs")
    states = [SimpleNamespace(value=value) for value in ("DEPLOYING", "DEPLOYING", "RUNNING")]
    found = iter(SimpleNamespace(status=state, deployments={"replica": replica}) for state in states)
    monkeypatch.setattr(serve, "status", lambda: SimpleNamespace(applications={"judge": next(found)}))
    monkeypatch.setattr(cluster.serving.service, "EXPLAIN_EVERY_S", 0.0)
    asyncio.run(cluster.serving.service._wait_until_running("judge"))
    said = capsys.readouterr().err
    assert said.count("judge is not up after 0 s: 1 replica waits for a node with 4 GPUs") == 2


def test_the_name_tells_settings_and_code_apart(tmp_path, monkeypatch):
    (tmp_path / "toyroom").mkdir()
    code = tmp_path / "toyroom" / "__init__.py"
    code.write_text("class Toy: ...")
    monkeypatch.syspath_prepend(tmp_path)
    first = application_name("toy", "toyroom:Toy", {"a": 1})
    assert first == application_name("toy", "toyroom:Toy", {"a": 1}) and first.startswith("toy-")
    assert first != application_name("toy", "toyroom:Toy", {"a": 2})
    code.write_text("class Toy: pass")
    assert first != application_name("toy", "toyroom:Toy", {"a": 1})


@pytest.mark.slow  # the judge's endpoint is the same over HTTP
def test_http_is_there_when_asked_for_and_on_loopback_only():
    port = free_port()

    async def calls():
        serve.shutdown()  # on a private Ray it stays, without HTTP
        async with echo(port=port) as service:
            async with httpx2.AsyncClient(trust_env=False) as client:
                answer = await client.post(f"http://127.0.0.1:{port}/v1/any/path", content=b"text")
            assert await service.call("slowly", 4, 0.0, timeout=20) == "#4"
            assert listening() == {"127.0.0.1"}
            with pytest.raises(ValueError, match=f"on 127.0.0.1:{port}, and cannot offer 127.0.0.1:{port + 1}"):
                async with echo(port=port + 1):
                    pass
            return answer

    answer = asyncio.run(calls())
    assert answer.status_code == 418
    assert answer.json() == {"method": "POST", "path": "/v1/any/path", "body": "text"}
    serve.shutdown()
