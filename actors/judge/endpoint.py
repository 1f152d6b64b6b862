"""The local judge as an OpenAI-compatible endpoint, as far as a judge needs it: models and chat completions.

Not streaming, greedy whatever the temperature; the output follows a JSON schema if the call gives one.
"""

import math
import time
import uuid
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError

from actors.judge.calls import Failure
from actors.judge.constrained import LABELS, Output
from actors.judge.local import Chat, LocalJudge

_STATUS = {"refused": 400, "rate_limit": 429, "timeout": 504, "closed": 503, "server_error": 500}
_NEVER = -9999.0  # vLLM's value for the log-probability of 0, -inf, which JSON cannot hold
_PATH = "/v1/chat/completions"


class _Schema(BaseModel):
    value: dict[str, Any] = Field(alias="schema")


class _Constrained(BaseModel):
    type: Literal["json_schema"]
    json_schema: _Schema


class _Free(BaseModel):
    type: Literal["text"]


class _Message(BaseModel):
    role: Literal["system", "user", "assistant"]
    content: str


class _Body(BaseModel):
    messages: Annotated[list[_Message], Field(min_length=1)]
    response_format: Annotated[_Constrained | _Free, Field(discriminator="type")] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None  # the newer name of max_tokens
    model: str
    stream: Literal[False] = False
    logprobs: bool = False


class JudgeEndpoint(LocalJudge):
    """A LocalJudge that answers HTTP, too; `name` is the model's name in calls."""

    def __init__(self, name: str, **kwargs: Any):
        super().__init__(**kwargs)
        self._name = name

    async def http(self, method: str, path: str, body: bytes) -> tuple[int, dict]:
        """Return status and JSON of one HTTP request."""
        if (method, path) == ("GET", "/v1/models"):
            return 200, {"object": "list", "data": [{"id": self._name, "object": "model", "owned_by": "prunella"}]}
        if (method, path) != ("POST", _PATH):
            return _error(404, f"{method} {path} is not offered: GET /v1/models, POST {_PATH}")
        try:
            call = _Body.model_validate_json(body)
        except ValidationError as error:
            first = error.errors()[0]
            return _error(400, f"{'.'.join(map(str, first['loc'])) or 'body'}: {first['msg']}")
        if call.model != self._name:
            return _error(400, f"the model is {self._name!r}")
        form = call.response_format
        schema = form.json_schema.value if isinstance(form, _Constrained) else None
        messages = [message.model_dump() for message in call.messages]
        output = await self.complete(Chat(messages, schema, call.max_completion_tokens or call.max_tokens))
        if isinstance(output, Failure):
            return _error(_STATUS[output.kind], output.message)
        return 200, self._completion(output, call)

    def _completion(self, output: Output, call: _Body) -> dict:
        choice: dict[str, Any] = {
            "index": 0,
            "message": {"role": "assistant", "content": output.text},
            "finish_reason": "length" if output.cut else "stop",
        }
        if call.logprobs:
            choice["logprobs"] = {"content": _tokens(output)}
        return {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": self._name,
            "choices": [choice],
        }


def _tokens(output: Output) -> list[dict]:
    """Return the output's tokens; the label's has the five labels beside it, the others none."""
    tokens: list[dict] = [
        {"token": piece, "logprob": logprob, "top_logprobs": []}
        for piece, logprob in zip(output.pieces, output.logprobs, strict=True)
    ]
    if output.label_at is not None and output.probabilities is not None:
        tokens[output.label_at]["top_logprobs"] = [
            {"token": label, "logprob": math.log(p) if p else _NEVER}
            for label, p in zip(LABELS, output.probabilities, strict=True)
        ]
    return tokens


def _error(status: int, message: str) -> tuple[int, dict]:
    return status, {"error": {"message": message, "type": "invalid_request_error", "code": status}}
