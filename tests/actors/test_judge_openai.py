"""The chat client against a server on this machine that misbehaves by script."""

import asyncio
import json
import math
import os
from email.utils import formatdate

import pytest

import actors.judge.openai
from actors.judge.calls import Failure, Reply, Request
from actors.judge.ladder import judge
from actors.judge.openai import OpenAIJudge, Token, label_probabilities
from tests.openai_server import OUTPUT, WHOLE, Server, completion, http

SCHEMA = {"type": "object", "properties": {"label": {"enum": [0, 1]}}}
LIMITED = {"type": "object", "properties": {"label": {"enum": [0, 1], "maxLength": 300}}}
ASKED = Request("system", "user", LIMITED, 64)


def ask_scripted(*script, times: int = 1, timeout: float = 5.0, **settings) -> tuple[list, Server]:
    """Ask a scripted server `times` times, one after the other."""

    async def run():
        async with Server(*script) as server:
            arguments = {"key_variable": None, "logprobs": False} | settings
            async with OpenAIJudge(server.url, "the-judge", timeout=timeout, **arguments) as client:
                return [await client.ask(ASKED) for _ in range(times)], server

    return asyncio.run(run())


def test_request_and_reply():
    """The endpoint is sent: greedy, the schema without maxLength, no logprobs unless offered, no key unless set."""
    (reply,), server = ask_scripted(http(completion(OUTPUT)))
    assert reply == Reply(OUTPUT)
    head, body = server.heard[0]
    assert head.startswith(b"POST /v1/chat/completions ") and b"authorization" not in head.lower()
    assert body == {
        "model": "the-judge",
        "messages": [{"role": "system", "content": "system"}, {"role": "user", "content": "user"}],
        "max_tokens": 64,
        "temperature": 0,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "judgement", "strict": True, "schema": SCHEMA},
        },
    }


@pytest.mark.parametrize(
    ("item", "kind", "says"),
    [
        (http(b"slow down", "429 Too Many Requests"), "rate_limit", "slow down"),
        (http(b"", "500 Internal Server Error"), "server_error", "500"),
        (http(b"", "503 Service Unavailable"), "server_error", "503"),
        (http(b"no such key", "401 Unauthorized"), "denied", "no such key"),
        (http(b"no such model", "404 Not Found"), "denied", "no such model"),
        (http(b"too long", "400 Bad Request"), "refused", "too long"),
        (http(b"", "302 Found", "Location: http://127.0.0.1:1/\r\n"), "refused", "302"),
        (b"", "closed", "disconnect"),
        (WHOLE[:-20], "closed", "incomplete|peer closed"),
        (b"not http at all\r\n\r\n", "closed", "Protocol"),
        (http(b"<html>busy</html>"), "server_error", "not a chat completion"),
        (http(completion(OUTPUT)[:-10]), "server_error", "not a chat completion"),
        (http(completion(OUTPUT) * 2), "server_error", "not a chat completion"),
        (http(b'{"choices": []}'), "server_error", "not a chat completion"),
        (http(b'{"error": "overloaded"}'), "server_error", "not a chat completion"),
        (http(b'{"choices": [{"message": {"content": ["4"]}}]}'), "server_error", "not a chat completion"),
        (http(b"\xff\xfe"), "server_error", "not a chat completion"),
        (http(b"not gzip", headers="Content-Encoding: gzip\r\n"), "closed", "Decoding"),
    ],
)
def test_misbehaviour(item, kind, says):
    """Every kind becomes the failure that the ladder knows, and none a score."""
    (failure,), _ = ask_scripted(item)
    assert isinstance(failure, Failure) and failure.kind == kind
    assert any(part.lower() in failure.message.lower() for part in says.split("|"))


@pytest.mark.parametrize("item", [10.0, [WHOLE[:30], 10.0], [WHOLE[i : i + 1] if i % 2 else 0.05 for i in range(60)]])
def test_slow_answers(item):
    """Silence, silence after the head, and a drip of bytes that never pauses for long: the whole call has a limit."""
    (failure,), _ = ask_scripted(item, timeout=0.3)
    assert (failure.kind, failure.message) == ("timeout", "no complete answer within 0.3 s")


def test_answer_to_nothing_is_not_taken_for_the_next():
    """A server that sends two responses to one request: the second request gets its own."""
    other = http(completion('{"reason": "mine", "label": 0}'))
    replies, _ = ask_scripted([WHOLE + WHOLE, 1.0], other, times=2)
    assert [reply.text for reply in replies] == [OUTPUT, '{"reason": "mine", "label": 0}']


def test_nobody_listens():
    """An endpoint that is not there is a closed connection, which may come back."""

    async def run():
        async with OpenAIJudge("http://127.0.0.1:9/v1", "m", None, 5.0, False) as client:
            return await client.ask(ASKED)

    assert asyncio.run(run()).kind == "closed"


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("Retry-After: 7\r\n", 7),
        (f"Retry-After: {formatdate(4e9, usegmt=True)}\r\n", 1e9),
        ("Retry-After: soon\r\n", None),
        ("Retry-After: ²\r\n", None),
        ("", None),
    ],
)
def test_retry_after(header, seconds):
    """Seconds, a date, nonsense, nothing."""
    (failure,), _ = ask_scripted(http(b"", "429 Too Many Requests", header))
    assert (failure.retry_after is None) if seconds is None else failure.retry_after >= seconds


def test_no_content_is_bad_output():
    """A refusal (null content) is the model's output, not the transport's failure."""
    (reply,), _ = ask_scripted(http(completion(None)))
    assert reply == Reply("")


LIKELY = [{"token": str(k), "logprob": -1.0 - k} for k in range(5)]


@pytest.mark.parametrize(
    ("logprobs", "known"),
    [
        ({"content": [{"token": "3", "logprob": -1.0, "top_logprobs": LIKELY}]}, True),
        ({"content": [{"token": "3", "top_logprobs": [*LIKELY[:4], {"token": "4", "logprob": -math.inf}]}]}, True),
        ({"content": [{"token": "3", "top_logprobs": [*LIKELY[:4], {"token": "a", "logprob": math.nan}]}]}, True),
        ({"content": [{"token": "3", "top_logprobs": [{"token": "3", "logprob": 1e-6}]}]}, True),
        ({"content": [{"token": "3", "top_logprobs": [{"token": str(k), "logprob": 1000} for k in range(5)]}]}, False),
        ({"content": [{"token": "3", "top_logprobs": [*LIKELY[:4], {"token": "4", "logprob": math.nan}]}]}, False),
        ({"content": [{"token": "3", "top_logprobs": [*LIKELY[:4], {"token": "4", "logprob": math.inf}]}]}, False),
        ({"content": [{"token": "3", "top_logprobs": [*LIKELY[:4], {"token": "4", "logprob": None}]}]}, False),
        ({"content": [{"token": "3", "logprob": -1.0, "top_logprobs": []}]}, False),
        ({"content": [{"token": "3", "logprob": -1.0, "top_logprobs": None}]}, False),
        ({"content": [{"token": "3", "logprob": -1.0}]}, False),
        ({"content": [{"token": "3", "logprob": "much"}]}, False),
        ({"content": "3"}, False),
        ([], False),
        ("none", False),
    ],
)
def test_log_probabilities_that_are_none_cost_the_output_nothing(logprobs, known):
    """NaN, infinite, positive, null, missing, of another type: the text is read, and no number is made up."""
    body = json.dumps({"choices": [{"message": {"content": OUTPUT}, "logprobs": logprobs}]}).encode()
    (reply,), _ = ask_scripted(http(body), logprobs=True)
    assert reply.text == OUTPUT and (reply.probabilities is not None) is known
    assert not known or (all(0 <= p <= 1 for p in reply.probabilities) and sum(reply.probabilities) > 0.5)


def test_asking_never_raises(monkeypatch):
    """Whatever goes wrong in the client itself is a failure, without the key."""
    monkeypatch.setenv("A_KEY", "sk-secret")

    def broken(*_):
        raise OverflowError("sk-secret is too large")

    monkeypatch.setattr(actors.judge.openai, "read_completion", broken)
    (failure,), _ = ask_scripted(WHOLE, key_variable="A_KEY")
    assert failure == Failure("server_error", "OverflowError: *** is too large")


def test_whole_ladder_over_a_bad_server():
    """429, a closed connection, half a JSON, a wrong schema, the label alone: five calls, one verdict."""
    script = [
        http(b"", "429 Too Many Requests", "Retry-After: 0\r\n"),
        b"",
        http(completion('{"reason": "half')),
        http(completion('{"score": 4}')),
        http(completion('{"label": 1}')),
    ]

    async def run():
        async with Server(*script) as server, OpenAIJudge(server.url, "m", None, 5.0, False) as client:
            return await judge(client.ask, "What?", "Eczema.", "Psoriasis.", lambda _: asyncio.sleep(0)), server

    verdict, server = asyncio.run(run())
    assert (verdict.label, verdict.tries) == (1, 5)
    assert verdict.raw == ('{"reason": "half', '{"score": 4}', '{"label": 1}')
    assert list(server.heard[-1][1]["response_format"]["json_schema"]["schema"]["properties"]) == ["label"]


def test_key(monkeypatch):
    """It is sent, it does not come back in a message, it has to be set, and does not travel in the clear."""
    monkeypatch.setenv("A_KEY", " sk-secret\n")
    (failure,), server = ask_scripted(http(b"bad key sk-secret", "401 Unauthorized"), key_variable="A_KEY")
    assert b"Authorization: Bearer sk-secret\r\n" in server.heard[0][0]
    assert "sk-secret" not in failure.message and "bad key ***" in failure.message
    (failure,), _ = ask_scripted(http(b"x" * 190 + b"sk-secret", "401 Unauthorized"), key_variable="A_KEY")
    assert "sk-" not in failure.message and len(failure.message) < 250  # blotted out, and then cut
    with pytest.raises(ValueError, match="unencrypted"):
        OpenAIJudge("http://judge.example/v1", "m", "A_KEY", 1.0, False)
    OpenAIJudge("https://judge.example/v1", "m", "A_KEY", 1.0, False)
    OpenAIJudge("http://judge.example/v1", "m", None, 1.0, False)
    for key in ("sk-\nsecret", "sk-secrét", "sk-\x00secret"):
        monkeypatch.setattr(os, "environ", {"A_KEY": key})
        with pytest.raises(ValueError, match="printable ASCII") as raised:
            OpenAIJudge("https://judge.example/v1", "m", "A_KEY", 1.0, False)
        assert "cr" not in str(raised.value)
    monkeypatch.undo()
    monkeypatch.delenv("A_KEY", raising=False)
    with pytest.raises(ValueError, match="A_KEY"):
        OpenAIJudge("https://judge.example/v1", "m", "A_KEY", 1.0, False)


@pytest.mark.parametrize(
    "url",
    [
        *("", "judge.example/v1", "ftp://judge.example", "http://", "http://[::1/v1", "http://judge.example:port/v1"),
        *("http://judge.example:99999/v1", "https://user:password@judge.example/v1"),
    ],
)
def test_no_url(url):
    """Refused before any call."""
    with pytest.raises(ValueError, match="URL") as raised:
        OpenAIJudge(url, "m", None, 1.0, False)
    assert "password@" not in str(raised.value)


def token(text: str, **likely: float) -> dict:
    """Return a token with the probabilities of the likeliest ones ("p4" stands for the text with 4 in it)."""
    top = [{"token": text.replace("3", name[1:]), "logprob": math.log(p)} for name, p in likely.items()]
    return {"token": text, "logprob": -1.0, "top_logprobs": top}


@pytest.mark.parametrize("text", ["3", " 3", "3}"])
def test_label_probabilities(text):
    """At the last digit, not at those of the reason; joined with neighbours or not; what is not a label is left out."""
    tokens = [token('{"reason": "'), token("3", p0=1.0), token('", "label":'), token(text, p2=0.2, p3=0.6, p7=0.1)]
    tokens += [token("}")]
    (reply,), server = ask_scripted(http(completion(OUTPUT, tokens)), logprobs=True)
    assert reply.probabilities == pytest.approx((0, 0, 0.2, 0.6, 0))
    assert server.heard[0][1]["logprobs"] is True and server.heard[0][1]["top_logprobs"] == 20


def test_label_probabilities_are_summed_over_spellings():
    """ "3" and " 3" are the same label; a token of two digits is none."""
    likely = [{"token": "3", "logprob": math.log(0.5)}, {"token": " 3", "logprob": math.log(0.25)}]
    made = Token.model_validate({"token": "3", "logprob": 0.0, "top_logprobs": likely})
    assert label_probabilities([made]) == pytest.approx((0, 0, 0, 0.75, 0))
    assert label_probabilities([Token.model_validate(token("34"))]) is None
    assert label_probabilities([Token.model_validate(token("}"))]) is None
