"""A small local judge, and what plain generate would answer."""

import asyncio

import pytest
import torch

from actors.judge.calls import Request
from actors.judge.constrained import schema_text
from actors.judge.ladder import RUNGS, request
from actors.judge.local import Chat, LocalJudge
from tests.judging import save_tiny_judge

SETTINGS = {
    "revision": None,
    "dtype": "float32",
    "trust_remote_code": False,
    "gpus": 0,
    "batch": 8,
    "max_length": 4096,
}


REQUESTS = [
    request("What is it?", "Psoriasis, a plaque.", "It is eczema. " * number, RUNGS[number % 3]) for number in range(9)
]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_tiny_judge(tmp_path_factory.mktemp("judge"))


def judge_of(path, **changes) -> LocalJudge:
    return LocalJudge(path, **{**SETTINGS, **changes})


@pytest.fixture(scope="module")
def judge(path):
    return judge_of(path)


def ask_all(judge, requests, method="complete") -> list:
    async def ask():
        return await asyncio.gather(*(getattr(judge, method)(each) for each in requests))

    return asyncio.run(ask())


def naive(judge: LocalJudge, call: Request | Chat) -> tuple[list[int], list[torch.Tensor]]:
    """Decode without cache, batch or padding: the likeliest of the tokens that may follow; and all logits."""
    matcher = judge._grammars.matcher(schema_text(call.schema) if call.schema else "")
    prompt, ids, seen = judge._prompt(call.messages), [], []
    while not matcher.is_stopped() and len(ids) < call.max_tokens:
        with torch.inference_mode():
            logits_V = judge._model(input_ids=torch.tensor([prompt + ids])).logits[0, -1].double()
        allowed = matcher.compute_logit_bias()
        token = next(t for t in logits_V.argsort(descending=True).tolist() if allowed[t])
        assert matcher.consume_token(token)
        ids.append(token)
        seen.append(logits_V)
    return ids, seen
