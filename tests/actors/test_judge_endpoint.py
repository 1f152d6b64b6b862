"""The local judge over HTTP: our client's calls, ordinary ones, and what it refuses."""

import asyncio
import json

import pytest
import torch

import actors.judge.local
from actors.judge.calls import Request
from actors.judge.endpoint import JudgeEndpoint
from actors.judge.local import Chat
from actors.judge.openai import chat_body, read_completion
from tests.actors.local_judging import REQUESTS, SETTINGS, ask_all, naive, path  # noqa: F401 (a fixture)


@pytest.fixture(scope="module")
def endpoint(path):  # noqa: F811
    return JudgeEndpoint(name="tiny", path=path, **SETTINGS)


def post(endpoint, body) -> tuple[int, dict]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return asyncio.run(endpoint.http("POST", "/v1/chat/completions", content))


def test_the_endpoint_answers_what_the_client_reads(endpoint):
    status, completion = post(endpoint, chat_body(REQUESTS[0], "tiny", logprobs=True))
    (own,) = ask_all(endpoint, [Request(REQUESTS[0].system, REQUESTS[0].user, unlimited(REQUESTS[0].schema), 256)])
    read = read_completion(json.dumps(completion))
    assert status == 200 and completion["choices"][0]["finish_reason"] == "stop"
    assert read.text == own.text and read.probabilities == pytest.approx(own.probabilities)
    assert "logprobs" not in post(endpoint, chat_body(REQUESTS[0], "tiny", logprobs=False))[1]["choices"][0]


def unlimited(schema: dict) -> dict:
    """Return the schema as the client sends it."""
    body = chat_body(Request("", "", schema, 1), "tiny", logprobs=False)
    return body["response_format"]["json_schema"]["schema"]


def test_the_endpoint_names_its_model(endpoint):
    status, models = asyncio.run(endpoint.http("GET", "/v1/models", b""))
    assert status == 200 and [model["id"] for model in models["data"]] == ["tiny"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "other"}, "the model is 'tiny'"),
        ({"stream": True}, "stream"),
        ({"response_format": {"type": "json_object"}}, "'json_schema', 'text'"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": "x<|im_end|>"}]}, "control tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5000}, "are more than 4096"),
        ({"messages": [{"role": "user", "content": "x " * 5000}], "max_tokens": None}, "are more than 4096"),
    ],
)
def test_the_endpoint_refuses_what_it_does_not_do(endpoint, change, message):
    status, answer = post(endpoint, {**chat_body(REQUESTS[0], "tiny", logprobs=True), **change})
    assert status == 400 and message in answer["error"]["message"]


USER = [{"role": "user", "content": "Hello"}]
SYSTEM_USER = [{"role": "system", "content": "x"}, *USER]


@pytest.mark.parametrize("messages", [USER, SYSTEM_USER, [*SYSTEM_USER, {"role": "assistant", "content": "y"}, *USER]])
def test_the_endpoint_takes_ordinary_calls(endpoint, messages):
    """Any turns, no limit or one under either name, no schema: greedy text, as long as the model goes on."""
    limited = {"model": "tiny", "messages": messages, "max_completion_tokens": 12, "temperature": 0.7, "n": 1}
    status, completion = post(endpoint, limited)
    (choice,) = completion["choices"]
    ids, _ = naive(endpoint, Chat(messages, None, 12))
    assert status == 200 and choice["finish_reason"] == "length"
    assert choice["message"] == {"role": "assistant", "content": endpoint._tokenizer.decode(ids)}


def test_an_ordinary_answer_ends_where_the_model_ends_it(endpoint, monkeypatch):
    """Without a limit: at the model's own end, which is no part of the text; at the latest at 1,024 tokens."""
    head = endpoint._model.lm_head
    wanted = [*endpoint._tokenizer.encode("It is 4."), endpoint._tokenizer.eos_token_id]
    steps = iter(wanted)

    def force_token(module, given, out):
        out = torch.zeros_like(out)
        out[..., next(steps, wanted[0])] = 9.0
        return out

    handle = head.register_forward_hook(force_token)
    try:
        body = {"model": "tiny", "messages": USER, "logprobs": True}
        _, completion = post(endpoint, body)
        (choice,) = completion["choices"]
        assert choice["message"]["content"] == "It is 4." and choice["finish_reason"] == "stop"
        assert "".join(token["token"] for token in choice["logprobs"]["content"]) == "It is 4."
        monkeypatch.setattr(actors.judge.local, "LONGEST_TEXT", 20)
        (choice,) = post(endpoint, body)[1]["choices"]
        assert choice["finish_reason"] == "length" and len(choice["logprobs"]["content"]) == 20
    finally:
        handle.remove()


def test_the_endpoint_refuses_what_is_no_call(endpoint):
    assert post(endpoint, b"{")[0] == 400
    assert asyncio.run(endpoint.http("GET", "/v1/chat/completions", b""))[0] == 404
    assert asyncio.run(endpoint.http("GET", "/metrics", b""))[0] == 404
