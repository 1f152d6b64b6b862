"""A judge without a model: it knows the verdict of every answer, and misbehaves where it is told to."""

import asyncio
import json
import random
import sys
from collections.abc import Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from actors.judge import ladder
from actors.judge.cache import JudgeIdentity
from actors.judge.calls import Failure, Reply, Request
from actors.judge.prompt import neutralise, parse_user_message
from cluster.tables import write_table
from jobs import evaluate
from jobs.core.options import load_config
from jobs.core.run import Run
from jobs.core.stage import Source, Stage

IDENTITY = JudgeIdentity("mock@1", "none", "none", "mock 1", "float32", "greedy")


def fair(question: str, reference: str, candidate: str) -> int:
    """4 for the reference, 2 for an answer that shares its last word, 0 for everything else."""
    if candidate == neutralise(reference):
        return 4
    words = candidate.split()
    return 2 if words and words[-1] == reference.split()[-1] else 0


class Mock:
    """An engine; `label` gives the verdict, `before` may return a Failure or raise; counts what it was asked.

    It takes `delay` seconds +-50 % for a call.
    """

    def __init__(self, label: Callable[[str, str, str], int] = fair, before: Callable | None = None, delay: float = 0):
        self.label, self.before, self.delay, self.draw = label, before, delay, random.Random(8)
        self.asked: list[tuple[str, str, str]] = []
        self.now = self.most = self.sessions = 0

    async def ask(self, request: Request) -> Reply | Failure:
        """Answer after `delay` seconds."""
        text = parse_user_message(request.user)
        self.asked.append(text)
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await asyncio.sleep(self.delay * self.draw.uniform(0.5, 1.5))
            failure = self.before(*text) if self.before else None
            if failure is not None:
                return failure
            label = self.label(*text)
            probabilities = tuple(0.9 if k == label else 0.02 for k in range(5))
            return Reply(json.dumps({"reason": "because", "label": label}), probabilities)
        finally:
            self.now -= 1

    def install(self, monkeypatch, identity: JudgeIdentity = IDENTITY) -> "Mock":
        """Stand in for jobs.judging.engine."""

        @asynccontextmanager
        async def judge_engine(run):
            self.sessions += 1
            yield self.ask, identity

        @asynccontextmanager
        async def endpoint(run):
            yield "http://127.0.0.1:1/v1"

        module = SimpleNamespace(
            judge_engine=judge_engine, judge_identity=lambda run: identity, endpoint=endpoint, check=lambda run: None
        )
        monkeypatch.setitem(sys.modules, "jobs.judging.engine", module)
        monkeypatch.setattr("jobs.judging.engine", module, raising=False)
        return self


def run_in(folder: Path, *options: tuple[str, str]) -> Run:
    """Return a run in `folder` with a judge."""
    return Run(load_config(None, [("run_dir", str(folder)), ("judge.engine", "transformers"), *options]))


DISEASES = ("psoriasis", "melanoma", "rosacea", "eczema")


def answer_rows(images: int = 12, right: float = 1.0, seed: int = 0) -> list[dict]:
    """Three questions about every image; a share of the images is answered rightly, the others with another disease."""
    draw = np.random.default_rng(seed)
    rows = []
    for image in range(images):
        disease, said = DISEASES[image % 4], DISEASES[(image + (draw.random() >= right)) % 4]
        for question in ("name", "treatment", "features"):
            reference = f"The {question} is that of {disease}"
            answer = f"The {question} is that of {said}"
            rows.append(
                {
                    "sample_id": f"{image}:{question}",
                    "question_id": question,
                    "image": f"{image}.png",
                    "group": f"series {image}",
                    "class": disease,
                    "question": f"What is the {question}?",
                    "reference": reference,
                    "answer": answer,
                    "baseline": float(answer == reference),
                    "verdict": ("right" if answer == reference else "wrong") if question == "name" else None,
                    "method": "which model it was",
                }
            )
    return rows


def evaluation(run, name: str, rows: list[dict], **found) -> Stage:
    """Return an evaluation that found `rows`, and other facts."""
    model = Source(f"model-{name}", "/nowhere")

    def build(r, folder, facts):
        write_table(folder / evaluate.ANSWERS, rows)
        facts |= {"metrics": {}, "profile": {}, **found}

    made = Stage("evaluate", 0, {}, (model,), build)
    run.make(made)
    return made


@pytest.fixture
def hurried(monkeypatch):
    """Retries wait a hundredth of a second instead of seconds."""
    monkeypatch.setattr(ladder, "FIRST_WAIT", dict.fromkeys(ladder.FIRST_WAIT, 0.001))


def texts(count: int) -> list[tuple[str, str, str]]:
    return [("What?", f"It is {n}.", f"Maybe {n}.") for n in range(count)]
