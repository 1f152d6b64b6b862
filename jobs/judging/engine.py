"""The judge that the config names: how it is called, and its identity in the verdicts' keys."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.judge.cache import JudgeIdentity
from actors.judge.calls import Failure, JudgeCall, Reply, Request, fold_system
from cluster.artifacts import digest
from jobs.config.judge import JudgeConfig
from jobs.core.run import Run
from jobs.core.signals import keep_handler
from jobs.core.stage import Source

if TYPE_CHECKING:
    from actors.judge.openai import OpenAIJudge
    from cluster.serving.service import Scale, Service
    from cluster.serving.vllm import VLLM

_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json")
_FOLDED = ", the system's text in the user's turn"
_NONE = (
    "No judge is configured: set judge.engine to transformers, vllm (on GPUs) or openai (any OpenAI-compatible "
    "endpoint, judge.url), and judge.model to its checkpoint or name."
)


@asynccontextmanager
async def judge_engine(run: Run) -> AsyncIterator[tuple[JudgeCall, JudgeIdentity]]:
    """Yield a function that calls the configured judge, and its identity; unless judge.keep, it ends with the block.

    The function returns a Failure where no answer came, and never raises. ValueError: the config names no judge, or
    one that cannot start; RuntimeError: it did not start.
    """
    settings = run.config.judge
    identity = judge_identity(run)
    async with AsyncExitStack() as stack:
        if settings.engine == "openai":
            yield (await stack.enter_async_context(_remote(settings))).ask, identity
            return
        served = _ServedJudge(run)
        if settings.engine == "vllm":
            yield await stack.enter_async_context(served.vllm()), identity
        else:
            yield await stack.enter_async_context(served.transformers()), identity


def check(run: Run) -> None:
    """Check the judge without starting it, before hours of other stages. ValueError: as of judge_engine."""
    settings = run.config.judge
    judge_identity(run)
    if settings.engine == "openai":
        _remote(settings)
        return
    served = _ServedJudge(run)
    served.scale()
    if settings.engine == "vllm":
        served.vllm_model()


def _remote(settings: JudgeConfig) -> "OpenAIJudge":
    from actors.judge.openai import OpenAIJudge

    return OpenAIJudge(_url(settings), settings.model, settings.key_variable, settings.timeout, settings.logprobs)


@asynccontextmanager
async def endpoint(run: Run) -> AsyncIterator[str]:
    """Serve the configured judge as an OpenAI-compatible endpoint on 127.0.0.1:judge.port; yield its URL up to /v1.

    It ends with the block, whatever judge.keep says. ValueError: as of judge_engine; engine openai is one already.
    """
    settings = run.config.judge
    if settings.engine == "openai":
        raise ValueError("judge.engine openai is an endpoint already: serve a judge of engine transformers or vllm.")
    judge_identity(run)
    async with _ServedJudge(run).http():
        yield f"http://127.0.0.1:{settings.port}/v1"


def judge_identity(run: Run) -> JudgeIdentity:
    """Return the configured judge's identity; ValueError: there is none, or its checkpoint cannot chat."""
    settings = run.config.judge
    if settings.engine == "none":
        raise ValueError(_NONE)
    if settings.engine == "openai":
        theirs = "the endpoint's"
        revision = f"{settings.model} at {_url(settings)}"
        sampling = "greedy" if settings.logprobs else "greedy, without probabilities"
        return JudgeIdentity(revision, theirs, theirs, "openai", theirs, sampling)
    from actors.judge.local import folds_system

    source, tokenizer = _source(run), _tokenizer(run)
    template = tokenizer.chat_template
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return JudgeIdentity(
        revision=source.name,
        tokenizer=_tokenizer_identity(run, source),
        chat_template=hashlib.sha256(text.encode()).hexdigest() + (_FOLDED if folds_system(tokenizer) else ""),
        engine=_versions(settings.engine),
        dtype=settings.dtype,
        sampling="greedy",
    )


def _url(settings: JudgeConfig) -> str:
    if not settings.url:
        raise ValueError(
            "judge.engine openai needs judge.url, the endpoint up to and including /v1 (http://host:8000/v1)."
        )
    return settings.url


def _source(run: Run) -> Source:
    return run.source(run.config.judge.model, "judge.model", run.config.judge.revision)


def _tokenizer(run: Run) -> Any:
    from actors.judge.local import judge_tokenizer

    source = _source(run)
    return judge_tokenizer(source.path, source.revision, run.config.judge.trust_remote_code)


def _tokenizer_identity(run: Run, source: Source) -> str:
    if source.revision is not None:
        return source.revision
    files = sorted({file for pattern in _TOKENIZER_FILES for file in Path(source.path).glob(pattern)})
    return digest({file.name: run.sources.fingerprints.file(file) for file in files})


def _versions(engine: str) -> str:
    """Return the engine and what its outputs depend on, with the versions installed here."""
    packages = {"transformers": ("transformers", "torch", "llguidance"), "vllm": ("vllm", "ray")}[engine]
    return ", ".join(f"{package} {_version(package)}" for package in packages)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "elsewhere"  # a driver without GPU need not have vLLM


def _vllm_name(label: str, model: "VLLM", scale: "Scale") -> str:
    from cluster.serving.service import application_name

    return application_name(label, "cluster.serving.vllm:VLLM", {"model": vars(model), "scale": vars(scale)})


@dataclass(frozen=True)
class _ServedJudge:
    """The judge on Ray Serve, asked through a handle or over HTTP."""

    run: Run

    @property
    def settings(self) -> JudgeConfig:
        return self.run.config.judge

    @asynccontextmanager
    async def transformers(self) -> AsyncIterator[JudgeCall]:
        from cluster.serving.service import serve_class

        kwargs, scale = self._kwargs(), self.scale()
        self._connect()
        async with serve_class("judge", "actors.judge.local:LocalJudge", kwargs, scale, self.settings.keep) as service:
            yield lambda request: self._through(lambda: _call(service, request, self.settings.timeout))

    @asynccontextmanager
    async def vllm(self) -> AsyncIterator[JudgeCall]:
        from actors.judge.local import folds_system
        from actors.judge.openai import chat_body, read_completion
        from cluster.serving.service import host_application
        from cluster.serving.vllm import chat, handle_application

        model, scale, folds = self.vllm_model(), self.scale(), folds_system(_tokenizer(self.run))
        self._connect()
        application = handle_application(model, scale)
        name = _vllm_name("judge", model, scale)

        async def ask(request: Request) -> Reply | Failure:
            body = chat_body(request, model.name, logprobs=True) | {"structured_outputs": {"json": request.schema}}
            del body["response_format"]
            body["messages"] = fold_system(body["messages"]) if folds else body["messages"]
            content = await chat(service, body, self.settings.timeout)
            answer = _error_of(content) or read_completion(content)
            # vLLM applies the schema to the logits before it takes their logarithms, whatever logprobs_mode says.
            return replace(answer, masked=True) if isinstance(answer, Reply) else answer

        async with host_application(name, application, scale, self.settings.keep) as service:
            yield lambda request: self._through(lambda: ask(request))

    @asynccontextmanager
    async def http(self) -> AsyncIterator[None]:
        from cluster.serving.service import host_application, serve_class

        scale, port = self.scale(), self.settings.port
        if self.settings.engine == "vllm":
            from cluster.serving.vllm import http_application

            model = self.vllm_model()
            self._connect()
            name = _vllm_name("judge-endpoint", model, scale)
            async with host_application(name, http_application(model, scale), scale, port=port):
                yield
        else:
            kwargs = {"name": self.settings.model, **self._kwargs()}
            self._connect()
            async with serve_class("judge-endpoint", "actors.judge.endpoint:JudgeEndpoint", kwargs, scale, port=port):
                yield

    def _connect(self) -> None:
        with keep_handler():  # ray.init replaces the handler of SIGTERM, which run_async needs
            self.run.workers.connect()

    def _kwargs(self) -> dict:
        source, settings = _source(self.run), self.settings
        return {
            "path": source.path,
            "revision": source.revision,
            "dtype": settings.dtype,
            "trust_remote_code": settings.trust_remote_code,
            "gpus": settings.gpus,
            "batch": settings.batch,
            "max_length": settings.max_length,
        }

    def vllm_model(self) -> "VLLM":
        """Return the judge as vLLM loads it; ValueError: no GPU is asked for, or vLLM is not installed."""
        from actors.judge.openai import TOP_LOGPROBS
        from cluster.serving.vllm import VLLM, require

        source, settings = _source(self.run), self.settings
        if not settings.gpus:
            raise ValueError("judge.engine vllm needs judge.gpus 1 or more; on a CPU use judge.engine transformers.")
        require()
        return VLLM(
            name=settings.model,
            path=source.path,
            revision=source.revision,
            dtype=settings.dtype,
            trust_remote_code=settings.trust_remote_code,
            max_length=settings.max_length,
            top_logprobs=TOP_LOGPROBS,
        )

    def scale(self) -> "Scale":
        """Return the judge's replicas and their resources; ValueError: judge.max_replicas is below judge.replicas."""
        from cluster.serving.service import Scale

        settings = self.settings
        most = settings.max_replicas or settings.replicas
        if most < settings.replicas:
            raise ValueError(f"judge.max_replicas is {most}, below judge.replicas {settings.replicas}: raise it.")
        # Two batches at a time: one waits while the other is answered. vLLM makes its own batches.
        at_once = settings.concurrency if settings.engine == "vllm" else 2 * settings.batch
        return Scale(settings.cpus, settings.gpus, settings.replicas, most, at_once)

    async def _through(self, call: Callable[[], Awaitable[Reply | Failure]]) -> Reply | Failure:
        from cluster.serving.service import ServiceLost

        try:
            return await call()
        except TimeoutError:
            return Failure("timeout", f"no answer within {self.settings.timeout:g} s")
        except ServiceLost as error:
            return Failure("closed", str(error))
        except asyncio.CancelledError:
            raise
        except Exception as error:
            return Failure("server_error", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


async def _call(service: "Service", request: Request, timeout: float) -> Reply | Failure:
    answer: Reply | Failure = await service.call("ask", request, timeout=timeout)
    return answer


def _error_of(content: str) -> Failure | None:
    """Return the failure that vLLM answered with ({"error": {"message", "code"}}), or None."""
    from actors.judge.openai import failure_kind

    error = json.loads(content).get("error")
    return Failure(failure_kind(error["code"]), error["message"][:200]) if error else None
