"""vLLM behind Ray Serve, through ray.serve.llm: large judges on GPUs. ray.serve.llm is only imported when it is used.

Names and meanings: docs.ray.io, "Serve LLM API" (LLMConfig, build_llm_deployment, build_openai_app) and docs.vllm.ai,
"Engine Arguments".
"""

from dataclasses import dataclass
from typing import Any

from cluster.connection import protect
from cluster.serving.service import Scale, Service, bind_to_node, send_with_retries

protect()


@dataclass(frozen=True)
class VLLM:
    """Which checkpoint vLLM loads, and how.

    max_length: of prompt and output together (tokens); top_logprobs: likeliest tokens that a call may ask for.
    """

    name: str
    path: str
    revision: str | None
    dtype: str
    trust_remote_code: bool
    max_length: int
    top_logprobs: int


def require() -> None:
    """Raise ValueError if ray.serve.llm or vLLM is not installed here."""
    _library()


def handle_application(model: VLLM, scale: Scale) -> Any:
    """Return a Serve application for `chat`."""
    return _library().build_llm_deployment(_config(model, scale))


def http_application(model: VLLM, scale: Scale) -> Any:
    """Return the application of an OpenAI-compatible endpoint."""
    ingress = {"ingress_cls": _bound_ingress()}
    return _library().build_openai_app({"llm_configs": [_config(model, scale)], "ingress_cls_config": ingress})


async def chat(service: Service, body: dict, timeout: float) -> str:
    """Send the body of a chat-completions call; return the completion, or {"error": {...}}, as JSON.

    See cluster.serving.service.Service.call for `timeout` and what is raised.
    """
    from ray.serve.llm.openai_api_models import ChatCompletionRequest

    request = ChatCompletionRequest(**body)

    async def send() -> str:
        # The server answers with a stream that holds one completion, as stream=True is not in the body.
        async for answer in service.handle.options(stream=True).chat.remote(request):
            return str(answer.model_dump_json())
        raise RuntimeError("vLLM ended its stream without an answer")

    return str(await send_with_retries(send, service.name, timeout))


def _config(model: VLLM, scale: Scale) -> Any:
    engine = {
        "tensor_parallel_size": int(scale.gpus),
        "max_model_len": model.max_length,
        "dtype": model.dtype,
        "revision": model.revision,
        "tokenizer_revision": model.revision,
        "trust_remote_code": model.trust_remote_code,
        "max_logprobs": model.top_logprobs,
        "generation_config": "vllm",  # without the checkpoint's sampling settings (Qwen's: repetition_penalty 1.05)
        "enable_prefix_caching": True,  # every call begins with the same rubric
        "seed": 0,
    }
    return _library().LLMConfig(
        model_loading_config={"model_id": model.name, "model_source": model.path},
        engine_kwargs={key: value for key, value in engine.items() if value is not None},
        deployment_config={**scale.options(), "ray_actor_options": {"num_cpus": scale.cpus}},
        server_cls=_bound_server(),
        runtime_env={"env_vars": {"VLLM_NO_USAGE_STATS": "1"}},
    )


def _bound_server() -> type:
    """Return ray.serve.llm's server with the port that Serve opens in each replica bound to the node's address."""
    library = _library()

    class LLMServer(library.LLMServer):  # type: ignore[name-defined, misc]
        async def __init__(self, *args: Any, **kwargs: Any):  # type: ignore[misc]
            bind_to_node()
            await super().__init__(*args, **kwargs)

    return LLMServer


def _bound_ingress() -> type:
    """Return ray.serve.llm's HTTP ingress with the port of its replica bound in the same way."""
    _library()
    from ray.serve.llm.ingress import OpenAiIngress

    class BoundIngress(OpenAiIngress):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any):
            bind_to_node()
            super().__init__(*args, **kwargs)

    return BoundIngress


def _library() -> Any:
    try:
        from ray.serve import llm
        from ray.serve.llm import openai_api_models  # noqa: F401 (it is what imports vLLM)
    except ImportError as error:
        raise ValueError(
            "judge.engine vllm needs vLLM and ray.serve.llm on every node: pip install '.[judge]' on machines "
            f"with a GPU, or choose judge.engine transformers ({' '.join(str(error).split())[:120]})."
        ) from None
    return llm
