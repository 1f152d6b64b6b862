"""Judges on Serve, and a vLLM that is none."""

import asyncio
import json
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from ray import serve

import cluster.serving.service
import cluster.serving.vllm
from actors.judge.ladder import RUNGS, request
from cluster.serving.service import Service
from jobs.core.options import load_config
from jobs.core.run import Run
from jobs.core.workers import Workers
from jobs.judging.engine import judge_engine
from tests.judging import save_tiny_judge

REQUESTS = [request("What is it?", "Psoriasis.", "It is eczema. " * number, RUNGS[2]) for number in range(6)]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_tiny_judge(tmp_path_factory.mktemp("judge"))


@pytest.fixture
def run_of(tmp_path, path, monkeypatch):
    """Return what makes a run with a judge; Ray is the test's own."""
    monkeypatch.setattr(Workers, "connect", lambda _: None)

    def make(**settings) -> Run:
        given = {"engine": "transformers", "model": path, "dtype": "float32", "gpus": 0, **settings}
        overrides = [(f"judge.{key}", str(value)) for key, value in given.items()]
        return Run(load_config(None, [("run_dir", str(tmp_path)), *overrides]))

    return make


def asked(run: Run, requests) -> list:
    """Return what the run's judge says to each request."""

    async def together():
        async with judge_engine(run) as (ask, _):
            return await asyncio.gather(*(ask(each) for each in requests))

    return asyncio.run(together())


class FakeVLLM:
    """Stands in for ray.serve.llm, notes what it is given, and answers chat calls with `answers`."""

    def __init__(self, monkeypatch, *answers: dict):
        self.configs: list[dict] = []
        self.requests: list[dict] = []
        self.answers = list(answers)
        llm: Any = ModuleType("ray.serve.llm")
        models: Any = ModuleType("ray.serve.llm.openai_api_models")
        llm.LLMConfig = lambda **settings: self.configs.append(settings) or settings
        llm.LLMServer = type("LLMServer", (), {})
        llm.build_llm_deployment = lambda config: ("handle", config)
        llm.build_openai_app = lambda settings: ("http", settings)
        llm.openai_api_models = models
        ingress: Any = ModuleType("ray.serve.llm.ingress")
        ingress.OpenAiIngress = SimpleNamespace
        monkeypatch.setitem(sys.modules, "ray.serve.llm.ingress", ingress)
        models.ChatCompletionRequest = lambda **body: body
        monkeypatch.setitem(sys.modules, "ray.serve.llm", llm)
        monkeypatch.setitem(sys.modules, "ray.serve.llm.openai_api_models", models)
        monkeypatch.setattr(serve, "llm", llm, raising=False)
        monkeypatch.setattr(cluster.serving.service, "host_application", self._hosted)
        self.hosted: list[tuple] = []

    def _hosted(self, name, application, scale, keep=False, port=None):
        self.hosted.append((name, application, scale, keep, port))
        handle = SimpleNamespace(options=lambda stream: SimpleNamespace(chat=SimpleNamespace(remote=self._chat)))

        class Block:
            async def __aenter__(self):
                return Service(name, handle)

            async def __aexit__(self, *_):
                pass

        return Block()

    async def _chat(self, body: dict):
        self.requests.append(body)
        answer = self.answers[len(self.requests) - 1]
        yield SimpleNamespace(model_dump_json=lambda: json.dumps(answer))


def completion() -> dict:
    likely = [{"token": str(k), "logprob": -float(k + 1)} for k in range(5)]
    tokens = [
        {"token": '{"label":', "logprob": -0.1, "top_logprobs": []},
        {"token": "0", "logprob": -1.0, "top_logprobs": likely},
    ]
    return {"choices": [{"message": {"content": '{"label":0}'}, "logprobs": {"content": tokens}}]}
