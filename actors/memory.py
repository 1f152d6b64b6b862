"""Memory: what a model needs, counted from its config before it is loaded, and what this process may take."""

import copy
from collections.abc import Sequence

import psutil
import torch
from transformers import AutoModelForImageTextToText

from actors.checkpoint.config import building
from actors.checkpoint.tensors import stored_bytes
from actors.quantizers.table import COMPRESSED_TENSORS, find_layout

TEXT_TOKENS = 512  # of a question and its answer, beside the image's tokens: room is kept for one such row
GIB = 2**30


class TooLittleMemory(ValueError):
    """A checkpoint needs more than is free, or more than a replica's share."""


def meta_model(config, trust_remote_code: bool = False):
    """Return the unquantized model that a config describes, on the meta device: shapes without numbers.

    ValueError: transformers cannot build it.
    """
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with building(config), torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, trust_remote_code=trust_remote_code)


def count_parameters(config) -> int:
    """Return the parameters of the unquantized model that a config describes."""
    return sum(parameter.numel() for parameter in meta_model(config).parameters())


def weight_bytes(path: str, config, itemsize: int, rounding: int | None, common: dict) -> int:
    """Return the smallest number of bytes that a checkpoint's weights take in memory.

    itemsize: bytes of a weight that is not rounded. rounding: bits of the decoder layers' weights if they are rounded
    while loading, else None. A quantized checkpoint takes its size on disk, unless loading dequantizes it. common:
    revision, trust_remote_code.
    """
    quantized = getattr(config, "quantization_config", None)
    if quantized and find_layout(quantized) is not COMPRESSED_TENSORS:  # loading dequantizes those
        return stored_bytes(path, common["revision"])
    bits = 0
    for name, parameter in meta_model(config, common["trust_remote_code"]).named_parameters():
        rounded = parameter.dim() == 2 and "language_model.layers." in name
        bits += parameter.numel() * (rounding if rounding and rounded else 8 * itemsize)
    return bits // 8


def cached_bytes(text_config, layers: int, itemsize: int) -> int:
    """Return the bytes of one token's keys and values in `layers` layers."""
    head = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    heads = getattr(text_config, "num_key_value_heads", None) or text_config.num_attention_heads
    return layers * 2 * heads * head * itemsize


def check_fits(path: str, weights: int, config, itemsize: int, devices: Sequence[torch.device]) -> None:
    """Raise TooLittleMemory if the weights (bytes) and one row's keys and values exceed the devices' free memory."""
    text = config.get_text_config()
    tokens = TEXT_TOKENS + (getattr(config, "image_seq_length", None) or 0)
    row = tokens * cached_bytes(text, text.num_hidden_layers, itemsize)
    free = sum(map(free_bytes, devices))
    if weights + row > free:
        place = "in main memory" if devices[0].type == "cpu" else f"on {len(devices)} GPU(s)"
        raise TooLittleMemory(
            f"{path!r} needs {(weights + row) / GIB:.2f} GiB (weights {weights / GIB:.2f}, keys and values of one "
            f"answer {row / GIB:.2f}), but {free / GIB:.2f} GiB are free {place}: set model.dtype to float16, give a "
            "quantized checkpoint, more GPUs per replica (replicas.gpus) or fewer replicas per GPU."
        )


def free_bytes(device: torch.device) -> int:
    """Return the memory that this process could still take on `device` (bytes), within its share of a GPU."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    free, total = torch.cuda.mem_get_info(device)
    allocated = torch.cuda.memory_allocated(device)
    share = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    return min(free + torch.cuda.memory_reserved(device) - allocated, share - allocated)


def claim_devices(device: str, gpus: float) -> list[torch.device]:
    """Return a replica's devices: the CPU, or its GPUs.

    If `gpus` is a fraction, this process may take only that share of the GPU's memory. ValueError: fewer than `gpus`
    GPUs are visible.
    """
    if device == "cpu":
        return [torch.device("cpu")]
    visible = torch.cuda.device_count()
    if gpus > visible:
        raise ValueError(f"A replica was given {gpus:g} GPUs, but {visible} are visible here: lower replicas.gpus.")
    first = torch.cuda.current_device() if gpus <= 1 else 0  # the ranks of a group see each other's GPUs
    devices = [torch.device("cuda", first + number) for number in range(max(1, int(gpus)))]
    for each in devices:
        torch.cuda.set_per_process_memory_fraction(min(1.0, gpus), each)
    return devices


def out_of_memory(error: Exception) -> bool:
    """Tell whether an allocation failed: torch has a class for that on a GPU, and a bare RuntimeError on a CPU."""
    phrases = ("not enough memory", "DefaultCPUAllocator", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in phrases)
