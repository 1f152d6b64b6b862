"""The memory of a setting by actors.estimate: one rule for the search, the joint choice and their budgets.

Weights that are not quantized have model.dtype, a prompt has an image, and a GPU its CUDA context.
"""

from typing import Any

from jobs.config.schema import Config
from jobs.core.run import Run
from jobs.core.text import GIB
from jobs.searching.sizing import make_setting, model_config


def shapes_of(run: Run) -> Any:
    """Return the Architecture (actors.estimate) of model.path at prune.width, from its config.json alone."""
    from actors.estimate import architecture
    from actors.narrowing.narrower import narrow_config

    # estimate.architecture is that of another model, which is not built
    estimate = run.config.estimate.model_copy(update={"architecture": None})
    model_run = Run(run.config.model_copy(update={"estimate": estimate}), parent_run=run)
    config = model_config(model_run)[0]
    if run.config.prune.width < 1:
        config = narrow_config(config, run.config.prune.width, run.config.quantize.group_size)
    return architecture(config, run.config.model.trust_remote_code)


def size_setting(config: Config, method: str, bits: tuple[int, ...]) -> Any:
    """Return the Setting (actors.estimate) whose memory is counted; bits: of every layer, 0 for a removed one."""
    return make_setting(config, method, bits, least_images=1)


def context_bytes(config: Config) -> int:
    """Return what the CUDA context takes of a GPU beside the model; 0 on a CPU."""
    return int(config.estimate.cuda_context_gib * GIB) if config.replicas.gpus else 0


def device_gib(config: Config, shapes: Any, method: str, bits: tuple[int, ...]) -> float:
    """Return a setting's memory on the fullest device (GiB); method "mixed" is what jobs.joint builds."""
    from actors.estimate import estimate

    sizes = estimate(shapes, size_setting(config, method, bits))
    return (sizes["device_bytes"] + context_bytes(config)) / GIB
