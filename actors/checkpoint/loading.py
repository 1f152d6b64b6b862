"""Loading LLaVA-shaped checkpoints, strictly: a weight that is missing, left over or not a number is an error."""

import importlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForImageTextToText, AutoProcessor, AwqConfig

from actors.checkpoint.config import complete_processor, read_config
from actors.checkpoint.foreign import describe_error, reading
from actors.checkpoint.tensors import loadable, local_folder, weight_files
from actors.memory import check_fits, claim_devices, free_bytes, meta_model, out_of_memory, weight_bytes
from actors.quantizers.table import GEMM, find_layout
from actors.specs import Llava

PARTS = ("vision_tower", "multi_modal_projector", "language_model")


def quiet() -> None:
    """Silence notices of the libraries that say nothing about the user's work (optional kernels, fallbacks)."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    for library in ("torchao", "bitsandbytes"):
        logging.getLogger(library).setLevel(logging.ERROR)


def pick_device() -> str:
    """Return "cuda" where a GPU is visible to this process, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_source(path: str) -> None:
    """Raise ValueError if `path` looks like a local folder but is not a checkpoint; hub ids pass."""
    folder = Path(path)
    looks_local = folder.is_absolute() or path.startswith((".", "~")) or path.count("/") != 1
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"{path!r} is a folder without config.json: give a checkpoint folder as model.path.")
        weight_files(folder)
    elif looks_local:
        raise ValueError(f"No checkpoint at {path!r}: give an existing folder or a hub id (owner/name) as model.path.")


def load_model(
    path: str,
    dtype: str = "float32",
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    gpus: float = 1,
    quantization=None,
) -> Llava:
    """Load a LLaVA-shaped model in eval mode on `device`, "cuda" or "cpu" (default: the GPU if there is one).

    dtype: "float32", "float16" or "bfloat16" of the weights that are not quantized. gpus: a fraction is the share of
    one GPU's memory that this process may take; over several the layers are spread; 0: the CPU. quantization: 4-bit
    settings, with which the decoder's linears are rounded while they are loaded.
    ValueError: not a checkpoint; weights missing, unexpected or of another shape; NaN or infinity in a weight; more
    memory needed than is free.
    """
    check_source(path)
    device = device or (pick_device() if gpus else "cpu")
    os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")  # halves the peak while bitsandbytes weights are loaded
    common = {"revision": revision, "trust_remote_code": trust_remote_code}
    config = read_config(path, revision, trust_remote_code)
    stored = getattr(config, "quantization_config", None) or {}
    devices, itemsize = claim_devices(device, gpus), getattr(torch, dtype).itemsize
    weights = weight_bytes(path, config, itemsize, None if quantization is None else 4, common)
    check_fits(path, weights, config, itemsize, devices)
    where = placement(devices)
    if len(devices) > 1 and not stored and quantization is None:
        _check_layers_fit(meta_model(config, trust_remote_code).to(getattr(torch, dtype)), where["max_memory"], path)
    layout = find_layout(stored)
    if layout and layout.reader:
        importlib.import_module(layout.reader)
    if device == "cpu" and quantization is None and layout is GEMM:
        quantization = cpu_awq(stored)
    extra = {"quantization_config": quantization} if quantization is not None else {}
    with loadable(path) as folder, loading_weights(path):
        model, info = AutoModelForImageTextToText.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            **where,
            attn_implementation="sdpa",
            use_safetensors=True,
            output_loading_info=True,
            **common,
            **extra,
        )
    check_complete(info, path)
    dequantize_weights(model)
    if not all(hasattr(model, "model") and hasattr(model.model, part) for part in PARTS):
        raise ValueError(f"{path!r} is a {type(model).__name__}, not a LLaVA-shaped model (tower, projector, LM).")
    _check_placed(getattr(model, "hf_device_map", {}), path)
    check_finite(model, path)
    _unify(model, getattr(torch, dtype))
    return model.eval()


@contextmanager
def loading_weights(path: str) -> Iterator[None]:
    """Turn what transformers raises while it loads weights into a ValueError of one sentence; out of memory passes."""
    try:
        with reading(path, "transformers does not load its weights", "copy the weights and config.json again"):
            yield
    except ValueError as error:
        if isinstance(error.__cause__, Exception) and out_of_memory(error.__cause__):
            raise error.__cause__ from None
        raise


def check_complete(info: dict, path: str) -> None:
    """Raise ValueError if from_pretrained's loading info names missing, unexpected or mismatched weights."""
    wrong = {k: sorted(map(str, v)) for k, v in info.items() if k.endswith("_keys") and v}
    if wrong:
        kind, names = next(iter(wrong.items()))
        raise ValueError(
            f"{path!r} does not hold the model its config.json describes: {kind.replace('_', ' ')} {names[0]!r}"
            f"{f' and {len(names) - 1} more' if len(names) > 1 else ''}. The layer count or a shard may be wrong."
        )


def dequantize_weights(model: Llava) -> None:
    """Dequantize a compressed-tensors checkpoint's weights now, instead of in the first forward pass.

    Its linears are plain afterwards, with weights in the type in which the model was loaded.
    """
    if hook := getattr(model, "ct_decompress_hook", None):
        from compressed_tensors.compressors.base import decompress_module
        from compressed_tensors.quantization import QuantizationMetadata

        hook.remove()
        for module in model.modules():
            if hasattr(module, "quantization_scheme"):
                decompress_module(module)
                QuantizationMetadata.clear_quantization(module)  # it would round the weight again at every step


def cpu_awq(stored: dict) -> AwqConfig:
    """Return a stored AWQ config with the backend that a CPU has."""
    keys = ("bits", "group_size", "zero_point", "modules_to_not_convert")
    return AwqConfig(**{key: stored[key] for key in keys if key in stored}, backend="torch_awq")


def placement(devices: list[torch.device]) -> dict:
    """Return the arguments with which from_pretrained puts the layers on these devices."""
    if len(devices) == 1:
        return {"device_map": {"": "cpu" if devices[0].type == "cpu" else devices[0].index}}
    return {"device_map": "auto", "max_memory": {device.index: free_bytes(device) for device in devices}}


def _check_layers_fit(meta: Llava, max_memory: dict[int, int], path: str) -> None:
    """Refuse a model that from_pretrained would not place on the GPUs alone, before it reads any weight.

    meta: the unquantized model on the meta device. (A quantized model's sizes are only known once it is loaded.)
    """
    from transformers.integrations.accelerate import get_balanced_memory, infer_auto_device_map

    unsplit = meta._no_split_modules
    balanced = get_balanced_memory(meta, dict(max_memory), unsplit)
    _check_placed(infer_auto_device_map(meta, balanced, unsplit), path)


def _check_placed(device_map: Mapping[str, int | str | torch.device], path: str) -> None:
    places = set(map(str, device_map.values()))
    if "disk" in places or ("cpu" in places and len(places) > 1):
        raise ValueError(
            f"{path!r} does not fit on the GPUs layer by layer: some would stay on the CPU or the disk. Give more GPUs "
            "per replica (replicas.gpus), float16 or a quantized checkpoint."
        )


def _unify(model: Llava, dtype: torch.dtype) -> None:
    # transformers leaves some weights of a stored bitsandbytes checkpoint in their stored type
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = dtype
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)


def check_finite(model: Llava, path: str) -> None:
    """Raise ValueError if a weight is NaN or infinite."""
    for name, tensor in model.named_parameters():
        if tensor.is_floating_point() and not torch.isfinite(tensor.detach().sum(dtype=torch.float64)).item():
            raise ValueError(f"{path!r} has NaN or infinite values in {name!r}: the checkpoint is broken, retrain it.")


def load_processor(path: str, revision: str | None = None, trust_remote_code: bool = False):
    """Load the processor of a checkpoint; ValueError if a part of it or its chat template is missing.

    Entries that its files lack are taken from config.json; `completed_from_config` names them.
    """
    check_source(path)
    remedy = "copy the processor's files (preprocessor_config.json, tokenizer.json, ...) from the original model."
    try:
        processor = AutoProcessor.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # libraries raise any exception at unexpected files
        raise ValueError(
            f"{path!r} has no processor that can be loaded ({describe_error(error).partition('. ')[0]}): {remedy}"
        ) from None
    if not (hasattr(processor, "image_processor") and hasattr(processor, "tokenizer")):
        raise ValueError(f"The processor of {path!r} is only a {type(processor).__name__}: {remedy}")
    if not getattr(processor, "chat_template", None):
        raise ValueError(f"The processor of {path!r} has no chat template: add its chat_template.jinja to the folder.")
    config = read_config(path, revision, trust_remote_code)
    processor.completed_from_config = complete_processor(processor, local_folder(path, revision), config)
    return processor


def language_model(model: Llava) -> Llava:
    """Return the decoder (embeddings, layers, final norm) of a LLaVA-shaped model."""
    return model.model.language_model


def layer_devices(model: Llava) -> list[torch.device]:
    """Return the device of every decoder layer."""
    return [next(layer.parameters()).device for layer in language_model(model).layers]


def pixel_dtype(model: Llava) -> torch.dtype:
    """Return the type the vision tower computes in (a quantized model's own `dtype` may be its scales')."""
    return next(model.model.vision_tower.parameters()).dtype
