"""The configured judge: mistakes before anything starts, a name that tells judges apart, one answer everywhere."""

import asyncio
import re
import signal
import socket
import sys
from types import SimpleNamespace

import pytest
from ray import serve
from ray.exceptions import ActorDiedError

import cluster.serving.service
import cluster.serving.vllm
from actors.judge.calls import Failure, Reply
from actors.judge.ladder import next_step
from actors.judge.local import LocalJudge
from actors.judge.openai import OpenAIJudge
from cluster.serving.service import Service
from jobs.core.workers import Workers
from jobs.judging.engine import check, endpoint, judge_identity
from tests.jobs.engines import REQUESTS, FakeVLLM, asked, completion
from tests.judging import save_tiny_judge


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"engine": "none"}, "set judge.engine to transformers"),
        ({"engine": "openai"}, "needs judge.url"),
        ({"engine": "openai", "url": "ftp://host/v1"}, r"is not an http\(s\) URL"),
        ({"engine": "openai", "url": "http://127.0.0.1:1/v1", "key_variable": "NO_KEY"}, "variable NO_KEY, which is"),
        ({"model": "/no/such/folder"}, "No checkpoint at judge.model '/no/such/folder'"),
        ({"replicas": 3, "max_replicas": 2}, "judge.max_replicas is 2, below judge.replicas 3"),
        ({"engine": "vllm", "gpus": 1}, r"needs vLLM.*\.\[judge\].*judge.engine transformers"),
        ({"engine": "vllm", "gpus": 0}, "needs judge.gpus 1 or more"),
    ],
)
def test_mistakes_are_told_before_anything_starts(run_of, monkeypatch, settings, message):
    monkeypatch.setattr(Workers, "connect", lambda _: pytest.fail("Ray was started"))
    with pytest.raises(ValueError, match=message):
        asked(run_of(**settings), [])
    with pytest.raises(ValueError, match=message):
        check(run_of(**settings))


def test_the_endpoint_of_an_endpoint_is_refused(run_of):
    async def start():
        async with endpoint(run_of(engine="openai", url="http://127.0.0.1:1/v1")):
            pass

    with pytest.raises(ValueError, match="is an endpoint already"):
        asyncio.run(start())


def test_an_endpoint_out_of_reach_is_a_failure(run_of):
    (answer,) = asked(run_of(engine="openai", url="http://127.0.0.1:1/v1", model="any"), REQUESTS[:1])
    assert answer.kind == "closed"


def test_the_identity_changes_with_what_decides_a_verdict_and_with_nothing_else(run_of, path, tmp_path):
    first = judge_identity(run_of())
    assert "llguidance" in first.engine and "transformers" in first.engine and first.sampling == "greedy"
    assert judge_identity(run_of(batch=3, replicas=2, timeout=5, keep=True, port=1234)) == first
    assert judge_identity(run_of(dtype="bfloat16")) != first
    other = judge_identity(run_of(model=save_tiny_judge(tmp_path / "other", seed=1)))
    assert other.revision != first.revision and other.tokenizer == first.tokenizer
    template = tmp_path / "other" / "chat_template.jinja"
    template.write_text(template.read_text().replace("system", "System") + " ")
    assert judge_identity(run_of(model=str(tmp_path / "other"))).chat_template != first.chat_template
    remote = judge_identity(run_of(engine="openai", url="http://127.0.0.1:1/v1", model="any"))
    assert remote.revision == "any at http://127.0.0.1:1/v1"
    bare = judge_identity(run_of(engine="openai", url="http://127.0.0.1:1/v1", model="any", logprobs=False))
    assert bare.revision == remote.revision and bare != remote  # its verdicts lack what another run may get


@pytest.mark.parametrize(
    ("end", "kind"),
    [(ActorDiedError(), "closed"), (ValueError("odd"), "server_error"), (None, "timeout")],
)
def test_what_goes_wrong_while_asking_is_a_failure(run_of, monkeypatch, end, kind):
    async def send():
        if end is not None:
            raise end
        await asyncio.sleep(60)

    class Hosted:
        async def __aenter__(self):
            return Service("judge", SimpleNamespace(call=SimpleNamespace(remote=lambda *_: send())))

        async def __aexit__(self, *_):
            pass

    monkeypatch.setattr(cluster.serving.service, "POLL_S", 0.0)
    monkeypatch.setattr(cluster.serving.service, "serve_class", lambda *args, **more: Hosted())
    (answer,) = asked(run_of(timeout=0.5), REQUESTS[:1])
    assert isinstance(answer, Failure) and answer.kind == kind


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.fixture
def serving(private_ray):
    """Serve on the private Ray, without settings of other tests, and without its own left for them."""
    serve.shutdown()
    yield
    serve.shutdown()


def here(path) -> list[Reply]:
    """Return what the judge says in this process."""
    judge = LocalJudge(path, None, "float32", False, 0, 16, 8192)

    async def together():
        return await asyncio.gather(*(judge.ask(each) for each in REQUESTS))

    return asyncio.run(together())


def same(replies, expected) -> None:
    assert [reply.text for reply in replies] == [reply.text for reply in expected]
    for one, other in zip(replies, expected, strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, rel=1e-3)


@pytest.mark.slow  # the judging of a table does the same
def test_a_judge_on_serve_says_what_it_says_here(serving, run_of, path):
    same(asked(run_of(), REQUESTS), here(path))
    assert not serve.status().applications


@pytest.mark.slow
def test_our_client_reads_from_our_endpoint_what_the_judge_says_here(serving, run_of, path):
    port = free_port()

    async def calls():
        async with endpoint(run_of(port=port)) as url, OpenAIJudge(url, path, None, 60, True) as client:
            assert url == f"http://127.0.0.1:{port}/v1"
            wrong = OpenAIJudge(url, "another", None, 60, True)
            return await asyncio.gather(*(client.ask(each) for each in REQUESTS)), await wrong.ask(REQUESTS[0])

    replies, wrong = asyncio.run(calls())
    same(replies, here(path))
    assert wrong.kind == "refused" and "another" not in wrong.message
    assert not serve.status().applications


def test_sigterm_stays_the_jobs_when_ray_starts(run_of, monkeypatch):
    """ray.init sets a handler of its own, which would end the process without a word."""
    monkeypatch.setattr(Workers, "connect", lambda _: signal.signal(signal.SIGTERM, lambda *_: sys.exit(15)))
    FakeVLLM(monkeypatch)
    before = signal.getsignal(signal.SIGTERM)
    try:
        asked(run_of(engine="vllm", gpus=1), [])
        assert signal.getsignal(signal.SIGTERM) is before
    finally:
        signal.signal(signal.SIGTERM, before)


def test_vllm_is_given_what_the_config_says(run_of, path, monkeypatch):
    refusal = {"error": {"message": "too long", "type": "BadRequestError", "code": 400}}
    fake = FakeVLLM(monkeypatch, completion(), refusal)
    run = run_of(engine="vllm", gpus=2, dtype="bfloat16", replicas=1, max_replicas=3, concurrency=40, max_length=2048)
    reply, refused = asked(run, [REQUESTS[0]] * 2)

    assert reply.text == '{"label":0}'
    assert reply.probabilities == pytest.approx([0.3679, 0.1353, 0.0498, 0.0183, 0.0067], abs=1e-4)
    verdict = next_step([reply] * 3, 0.0)  # on the rung that asks for the label alone
    assert verdict.expected == pytest.approx(0.5481, abs=1e-3)
    assert verdict.label_mass is None  # vLLM's labels have all the mass that the schema leaves, which says nothing
    assert refused == Failure("refused", "too long")
    body = fake.requests[0]
    assert body["model"] == path and body["messages"] == REQUESTS[0].messages and body["temperature"] == 0
    assert body["structured_outputs"] == {"json": REQUESTS[0].schema} and "response_format" not in body
    assert body["logprobs"] is True and body["top_logprobs"] == 20 and not body.get("stream")

    (config,) = fake.configs
    assert config["model_loading_config"] == {"model_id": path, "model_source": path}
    engine = config["engine_kwargs"]
    assert engine["tensor_parallel_size"] == 2 and engine["max_model_len"] == 2048 and engine["dtype"] == "bfloat16"
    assert engine["max_logprobs"] == 20
    assert config["runtime_env"]["env_vars"] == {"VLLM_NO_USAGE_STATS": "1"}
    assert engine["generation_config"] == "vllm"  # else Qwen's repetition penalty of 1.05 would apply
    deployment = config["deployment_config"]
    assert deployment["autoscaling_config"]["max_replicas"] == 3 and deployment["max_ongoing_requests"] == 40
    assert issubclass(config["server_cls"], serve.llm.LLMServer)
    ((name, application, scale, keep, port),) = fake.hosted
    assert name.startswith("judge-") and application == ("handle", config) and scale.gpus == 2
    assert keep is False and port is None


def test_vllms_endpoint_is_its_own(run_of, monkeypatch):
    fake = FakeVLLM(monkeypatch)

    async def start():
        async with endpoint(run_of(engine="vllm", gpus=1, port=8123)) as url:
            return url

    assert asyncio.run(start()) == "http://127.0.0.1:8123/v1"
    ((name, application, _, _, port),) = fake.hosted
    assert re.fullmatch("judge-endpoint-[0-9a-f]+", name)
    kind, settings = application
    assert kind == "http" and settings["llm_configs"] == fake.configs and port == 8123
    bound = []  # so is the port that Serve opens in the replica in front of it
    monkeypatch.setattr(cluster.serving.vllm, "bind_to_node", lambda: bound.append(True))
    assert settings["ingress_cls_config"]["ingress_cls"](model_cards={}).model_cards == {} and bound == [True]
