"""A judge that transformers runs in this process: calls that come at the same time are answered as one batch.

Greedy. In float32 a call's output does not depend on the batch; in half precision the rounding of sums depends on the
batch's shape, so that one of two almost equally likely tokens may be chosen instead of the other.
"""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from actors.checkpoint.loading import check_complete, check_finite, check_source, placement, quiet
from actors.checkpoint.tensors import stored_bytes
from actors.judge.calls import Failure, Reply, Request, fold_system
from actors.judge.constrained import Grammars, Output, Task, schema_text, write
from actors.judge.prefix import SharedPrefix
from actors.memory import GIB, claim_devices, free_bytes, out_of_memory

LOG = logging.getLogger("actors.judge")

LINGER_S = 0.005  # the wait for more calls of the same batch
LASTING = 3  # different calls that fail in a row: the judge is broken
_REFUSALS = (ValueError, TypeError, TemplateError)  # raised by a template, or by a schema
LONGEST_TEXT = 1024  # tokens of an output whose call sets no limit


@dataclass(frozen=True)
class Chat:
    """An ordinary call: messages of any roles that the template knows; schema None: any text.

    max_tokens None: LONGEST_TEXT, or what the prompt leaves of the model's length.
    """

    messages: list[dict[str, str]]
    schema: dict[str, Any] | None
    max_tokens: int | None


class LocalJudge:
    """Any causal language model with a chat template, as a judge; use it within one event loop.

    gpus: whole GPUs over which the layers are spread, 0: the CPU; batch: most calls in one batch; max_length: of
    prompt and output together (tokens), at most the model's own. ValueError: no such checkpoint, weights missing or
    not finite, no chat template, a tokenizer that cannot be constrained, too little memory.
    """

    def __init__(
        self,
        path: str,
        revision: str | None,
        dtype: str,
        trust_remote_code: bool,
        gpus: int,
        batch: int,
        max_length: int,
    ):
        quiet()
        self._tokenizer = judge_tokenizer(path, revision, trust_remote_code)
        self._folds = folds_system(self._tokenizer)
        self._model = _load(path, dtype, gpus, {"revision": revision, "trust_remote_code": trust_remote_code})
        text = self._model.config.get_text_config()
        self._longest = min(max_length, getattr(text, "max_position_embeddings", None) or max_length)
        self._grammars = Grammars(self._tokenizer, text.vocab_size, _stops(self._model, self._tokenizer))
        self._pad = self._tokenizer.pad_token_id or 0  # masked: which one it is does not matter
        self._controls: dict[tuple[str, ...], int] = {}
        self._shared = SharedPrefix(self._model)
        self._system: str | None = None
        self._prefix: list[int] = []
        self._batch = batch
        self._waiting: list[tuple[Task, asyncio.Future]] = []
        self._worker: asyncio.Task | None = None
        self._failed: set[tuple[int, ...]] = set()  # prompts that failed alone since the last answer
        self._broken: str | None = None

    async def ask(self, request: Request) -> Reply | Failure:
        """Return the judge's output, or why there is none."""
        output = await self.complete(request)
        return output if isinstance(output, Failure) else Reply(output.text, output.probabilities)

    async def complete(self, call: Request | Chat) -> Output | Failure:
        """Return the output with its tokens, or why there is none."""
        task = self._task(call)
        if isinstance(task, Failure):
            return task
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((task, future))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await future

    def check_health(self) -> None:
        """Raise RuntimeError if the judge is broken: a new process must replace it."""
        if self._broken:
            raise RuntimeError(self._broken)

    def _prompt(self, messages: list[dict[str, str]]) -> list[int]:
        messages = fold_system(messages) if self._folds else messages
        inputs = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        return list(inputs["input_ids"])

    def _control_tokens(self, ids: Sequence[int]) -> int:
        return sum(map(self._grammars.tokens.is_special_token, ids))

    def _template_controls(self, roles: tuple[str, ...]) -> int:
        """Return how many control tokens the template itself puts around messages of these roles."""
        if roles not in self._controls:
            prompt = self._prompt([{"role": role, "content": "x"} for role in roles])
            self._controls[roles] = self._control_tokens(prompt)
        return self._controls[roles]

    def _task(self, call: Request | Chat) -> Task | Failure:
        messages = call.messages
        try:
            prompt = self._prompt(messages)
            controls = self._template_controls(tuple(message["role"] for message in messages))
            schema = "" if call.schema is None else schema_text(call.schema)
            self._grammars.matcher(schema)
        except _REFUSALS as error:
            return Failure("refused", str(error))
        if self._control_tokens(prompt) != controls:
            return Failure("refused", "a text in the prompt reads as one of the model's control tokens")
        limit = call.max_tokens or max(1, min(LONGEST_TEXT, self._longest - len(prompt)))
        if len(prompt) + limit > self._longest:
            return Failure(
                "refused", f"{len(prompt)} tokens of prompt and {limit} of output are more than {self._longest}"
            )
        return Task(prompt, schema, limit, self._prefix_of(messages[0]))

    def _prefix_of(self, first: dict[str, str]) -> list[int]:
        """Return the token ids that all prompts with this system message share; [] if it is not a system's."""
        system = first["content"]
        if first["role"] != "system":
            return []
        if system != self._system:
            prompts = [self._prompt(Request(system, user, {}, 0).messages) for user in "ab"]
            pairs = zip(*prompts, strict=False)
            self._system, self._prefix = (
                system,
                [token for token, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)],
            )
        return self._prefix

    async def _work(self) -> None:
        """Answer the waiting calls, batch by batch, until there are none."""
        while self._waiting:
            await asyncio.sleep(LINGER_S)
            self._waiting = [(task, future) for task, future in self._waiting if not future.done()]  # not cancelled
            batch, self._waiting = self._waiting[: self._batch], self._waiting[self._batch :]
            if not batch:
                continue
            answers = await self._answer([task for task, _ in batch])
            for (_, future), answer in zip(batch, answers, strict=True):
                if not future.done():
                    future.set_result(answer)

    async def _answer(self, tasks: list[Task]) -> Sequence[Output | Failure]:
        """Answer tasks together; if that fails, one by one, so that one of them does not cost the others.

        A task that fails alone may be the cause itself. The judge is broken when LASTING different tasks failed with no
        answer in between, or after a CUDA error.
        """
        if self._broken:
            return [Failure("server_error", self._broken) for _ in tasks]
        try:
            answers = await asyncio.to_thread(self._write_batch, tasks)
        except Exception as error:
            device = "CUDA error" in str(error)
            if len(tasks) > 1 and not device:
                return [answer for task in tasks for answer in await self._answer([task])]
            LOG.exception("The judge failed")
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            self._failed.add(tuple(tasks[0].prompt))
            if device or len(self._failed) >= LASTING:
                self._broken = reason
            return [Failure("server_error", reason) for _ in tasks]
        self._failed.clear()
        return answers

    def _write_batch(self, tasks: list[Task]) -> Sequence[Output | Failure]:
        """Answer tasks in one batch; when it runs out of memory, halve this and all later batches."""
        try:
            return write(self._model, self._grammars, tasks, self._pad, self._shared)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            if len(tasks) == 1:
                return [Failure("refused", f"out of memory at {len(tasks[0].prompt)} tokens of prompt")]
        torch.cuda.empty_cache()
        half = self._batch = (len(tasks) + 1) // 2
        return [*self._write_batch(tasks[:half]), *self._write_batch(tasks[half:])]


def judge_tokenizer(path: str, revision: str | None, trust_remote_code: bool) -> Any:
    """Load a judge's tokenizer; ValueError: there is none, or it has no chat template."""
    check_source(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split()).partition(".")[0]
        raise ValueError(f"judge.model {path!r} has no tokenizer that can be loaded ({reason}).") from None
    if not tokenizer.chat_template:
        raise ValueError(f"judge.model {path!r} has no chat template: give a model that was trained to chat.")
    return tokenizer


def folds_system(tokenizer: Any) -> bool:
    """Tell whether the chat template refuses a system message (as Gemma's does) or drops it."""
    system, user = "what the system says", "what the user says"
    try:
        prompt = tokenizer.apply_chat_template(Request(system, user, {}, 0).messages, tokenize=False)
    except _REFUSALS:
        return True
    return system not in prompt


def _load(path: str, dtype: str, gpus: int, common: dict) -> Any:
    devices = claim_devices("cuda" if gpus else "cpu", gpus)
    weights, free = stored_bytes(path, common["revision"]), sum(map(free_bytes, devices))
    if weights > free:
        raise ValueError(
            f"judge.model {path!r} has {weights / GIB:.1f} GiB of weights and {free / GIB:.1f} GiB are free: give more "
            "GPUs (judge.gpus), or a smaller or quantized checkpoint."
        )
    model, info = AutoModelForCausalLM.from_pretrained(
        path,
        config=AutoConfig.from_pretrained(path, **common),
        dtype=getattr(torch, dtype),
        **placement(devices),
        attn_implementation="sdpa",
        use_safetensors=True,
        output_loading_info=True,
        **common,
    )
    check_complete(info, path)
    if {"cpu", "disk"} & set(map(str, getattr(model, "hf_device_map", {}).values())) and devices[0].type != "cpu":
        raise ValueError(f"judge.model {path!r} does not fit on {gpus} GPU(s): give more (judge.gpus).")
    check_finite(model, path)
    return model.eval()


def _stops(model: Any, tokenizer: Any) -> list[int]:
    """Return the token ids that end an output: the tokenizer's, and those of the checkpoint's generation config."""
    stops = model.generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    return sorted({number for number in [tokenizer.eos_token_id, *stops] if number is not None})
