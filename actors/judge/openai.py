"""A judge behind an OpenAI-compatible endpoint (vLLM, SGLang, llama.cpp, a service): one call, no retries.

The answers are sent to the URL's host. The key comes only from an environment variable, is sent only over https or to
this machine, and is removed from error messages.
"""

import asyncio
import ipaddress
import math
import os
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Annotated, Any

import httpx2
from pydantic import BaseModel, Field, ValidationError

from actors.judge.calls import Failure, FailureKind, Reply, Request

LABEL_DIGITS = "01234"
TOP_LOGPROBS = 20  # what OpenAI allows at most and vLLM by default
_LONGEST_MESSAGE = 220  # characters
_MOST_MASS = 1.01  # largest sum of the labels' probabilities; above it they are not probabilities


class _Likely(BaseModel):
    token: str
    logprob: float | None = None


class Token(_Likely):
    """A token of the output with the likeliest ones at its place."""

    top_logprobs: list[_Likely] | None = None


class _Logprobs(BaseModel):
    content: list[Token] | None = None


class _Message(BaseModel):
    content: str | None  # null: the model refused


class _Choice(BaseModel):
    message: _Message
    logprobs: Any = None  # validated separately: an output without them is valid


class _Completion(BaseModel):
    choices: Annotated[list[_Choice], Field(min_length=1, max_length=1)]


class OpenAIJudge:
    """Asks a chat-completions endpoint; use it with `async with`, within one event loop.

    url: up to and including /v1; key_variable: environment variable that holds the key (None: no key); timeout: for a
    whole call (s), however slowly its bytes arrive; logprobs: whether the endpoint offers them. ValueError: not an
    http(s) URL, the variable holds no key, or a key would be sent unencrypted to another machine.
    """

    def __init__(self, url: str, model: str, key_variable: str | None, timeout: float, logprobs: bool):
        parsed = _parse_url(url)
        self._key = os.environ.get(key_variable, "").strip() if key_variable else ""
        if key_variable and not self._key:
            raise ValueError(f"The judge's key is expected in the environment variable {key_variable}, which is empty.")
        if not (self._key.isascii() and self._key.isprintable()):
            raise ValueError(
                f"The judge's key in {key_variable} is not a key: it has characters beyond printable ASCII."
            )
        local = _is_loopback(parsed.host)
        if self._key and parsed.scheme == "http" and not local:
            raise ValueError(f"The judge's key would travel unencrypted to {parsed.host}: use https.")
        self._url, self._model, self._timeout, self._logprobs = url.rstrip("/"), model, timeout, logprobs
        # A new connection per call: on a shared one, a second answer to one call would be taken for the next call's.
        self._client = httpx2.AsyncClient(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=None,
            limits=httpx2.Limits(max_keepalive_connections=0),
            trust_env=not local,
        )

    async def __aenter__(self) -> "OpenAIJudge":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def ask(self, request: Request) -> Reply | Failure:
        """Return the judge's output, or why none came; never raises."""
        try:
            return await self._request(request)
        except Exception as error:
            return Failure("server_error", self._excerpt(f"{type(error).__name__}: {error}"))

    async def _request(self, request: Request) -> Reply | Failure:
        try:
            async with asyncio.timeout(self._timeout):
                response = await self._client.post(
                    f"{self._url}/chat/completions", json=chat_body(request, self._model, self._logprobs)
                )
        except TimeoutError:
            return Failure("timeout", f"no complete answer within {self._timeout:g} s")
        except httpx2.RequestError as error:
            return Failure("closed", self._excerpt(f"{type(error).__name__}: {error}"))
        if response.status_code != 200:
            message = self._excerpt(f"HTTP {response.status_code}: {response.text}")
            return Failure(
                failure_kind(response.status_code), message, _retry_after(response.headers.get("retry-after"))
            )
        return read_completion(response.content)

    def _excerpt(self, message: str) -> str:
        """Return the beginning of a message, without the key."""
        return (message.replace(self._key, "***") if self._key else message)[:_LONGEST_MESSAGE]


def _parse_url(url: str) -> httpx2.URL:
    """Return an endpoint's URL; ValueError: not a URL, or it holds a password, which tables and caches would keep."""
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL:
        parsed = httpx2.URL("")
    if parsed.userinfo:
        raise ValueError("The judge's URL holds a user or password: give the key by judge.key_variable instead.")
    if parsed.scheme not in ("http", "https") or not parsed.host or (parsed.port or 0) > 65535:
        raise ValueError(f"The judge's URL {url!r} is not an http(s) URL: give something like https://host/v1.")
    return parsed


def _strict(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema without maxLength, which strict mode refuses at some endpoints ("maxLength is not permitted")."""
    parts = {
        name: {key: value for key, value in part.items() if key != "maxLength"}
        for name, part in schema["properties"].items()
    }
    return {**schema, "properties": parts}


def chat_body(request: Request, model: str, logprobs: bool) -> dict:
    """Return the body of a chat-completions call, with the schema and, if asked for, the tokens' log-probabilities."""
    schema = {"name": "judgement", "strict": True, "schema": _strict(request.schema)}
    body = {
        "model": model,
        "messages": request.messages,
        "max_tokens": request.max_tokens,
        "temperature": 0,
        "response_format": {"type": "json_schema", "json_schema": schema},
    }
    return body | ({"logprobs": True, "top_logprobs": TOP_LOGPROBS} if logprobs else {})


def read_completion(content: str | bytes) -> Reply | Failure:
    """Return the reply of a chat completion (JSON), or a failure if it is not one."""
    try:
        choice = _Completion.model_validate_json(content).choices[0]
    except ValidationError as error:
        return Failure("server_error", f"not a chat completion: {error.errors()[0]['msg']}")
    try:
        tokens = _Logprobs.model_validate(choice.logprobs).content
    except ValidationError:
        tokens = None
    return Reply(choice.message.content or "", label_probabilities(tokens) if tokens else None)


def label_probabilities(tokens: list[Token]) -> tuple[float, ...] | None:
    """Return the probabilities of the labels 0-4 at the label's token, which has the output's last digit.

    A tokenizer may join the label with its neighbours (" 4", "4}"): then the other labels are the same token with
    another digit. Labels that are not among the likeliest tokens have 0. None: no such token, no likeliest tokens, or
    values that are not probabilities.
    """
    for token in reversed(tokens):
        text = token.token.strip()
        if any(sign.isdigit() for sign in text):
            if sum(sign.isdigit() for sign in text) != 1 or not token.top_logprobs:
                return None
            shapes = [text.translate({ord(sign): digit for sign in text if sign.isdigit()}) for digit in LABEL_DIGITS]
            masses = [sum(_probability(t) for t in token.top_logprobs if t.token.strip() == s) for s in shapes]
            return tuple(masses) if sum(masses) <= _MOST_MASS else None  # NaN fails this, too
    return None


def _probability(likely: _Likely) -> float:
    """Return exp(logprob), at most 1 (rounding); NaN if it is missing, not a number or infinite."""
    finite = likely.logprob is not None and likely.logprob < math.inf
    return math.exp(min(likely.logprob, 0.0)) if finite else math.nan  # type: ignore[arg-type, type-var]


def failure_kind(status: int) -> FailureKind:
    """Return what an HTTP status other than 200 means for the ladder."""
    if status == 429:
        return "rate_limit"
    if status == 408:
        return "timeout"
    if status in (401, 402, 403, 404):  # key, payment, permission, model or path
        return "denied"
    return "server_error" if status >= 500 else "refused"


def _retry_after(header: str | None) -> float | None:
    """Return the seconds of a Retry-After header, given as a number or as a date (RFC 9110, 10.2.3)."""
    if header is None:
        return None
    if header.isascii() and header.strip().isdigit():
        return float(header)
    try:
        seconds = (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError):
        return None
    return max(seconds, 0.0)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
