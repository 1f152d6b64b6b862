"""Reading a checkpoint one decoder layer at a time, writing one whose decoder linears are rounded, and checking it."""

import ctypes
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from actors.checkpoint.tensors import (
    copy_companions,
    iterate_tensors,
    read_tensor,
    stored_bytes,
    stored_dtype,
    weight_files,
    write_tensors,
)
from actors.quantizers.structure import linear_shapes
from actors.quantizers.table import find_method
from actors.specs import QuantizeSettings

SHARD_BYTES = 2**28  # of one file; as much is in memory while it is written
BLOCK_BYTES = 2**20  # the smallest block of memory that returns to the system as soon as it is freed
_LAYER = re.compile(r"^.*\blanguage_model\.(?:model\.)?layers\.(\d+)\.(.+)$")


def rest_dtype(source: Path) -> torch.dtype:
    """Return the 16-bit type for what is not rounded: the checkpoint's own, float16 for float32."""
    stored = stored_dtype(str(source))
    return torch.float16 if stored == torch.float32 else stored


def read_layers(source: Path, layers: int) -> Iterator[dict[str, tuple[str, torch.Tensor]]]:
    """Yield the decoder layers in order, each as {name in the layer: (name in the file, tensor)}.

    ValueError: the files hold another number of layers than `layers`, the config's number.
    """
    where: dict[int, dict[str, tuple[str, Path]]] = {}
    for file in weight_files(source):
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 (a safe_open cannot be iterated)
                if match := _LAYER.match(name):
                    where.setdefault(int(match[1]), {})[match[2]] = (name, file)
    if sorted(where) != list(range(layers)):
        raise ValueError(f"{str(source)!r} holds {len(where)} decoder layers but its config.json says {layers}.")
    for number in range(layers):
        yield {part: (name, read_tensor(file, name)) for part, (name, file) in where[number].items()}


def keep_blocks_apart() -> None:
    """Make glibc map every block of BLOCK_BYTES or more by itself, so that it returns to the system when it is freed.

    By default glibc soon takes weights from its heap, where freed blocks between live ones stay with the process.
    """
    option = getattr(ctypes.CDLL(None), "mallopt", None)
    if option is not None:
        option(-3, BLOCK_BYTES)  # M_MMAP_THRESHOLD


def fill(layer: nn.Module, tensors: Mapping[str, tuple[str, torch.Tensor]], like: torch.Tensor) -> None:
    """Load a layer's tensors (`read_layers`) into a module on the meta device, with the device and type of `like`."""
    layer.load_state_dict(
        {part: tensor.to(like.device, like.dtype, copy=True) for part, (_, tensor) in tensors.items()}, assign=True
    )


def release() -> None:
    """Return freed memory to the system: glibc keeps what lies below a block in use.

    The parts of rounded weights, held until their shard is written, would otherwise pin the memory between them.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def other_tensors(source: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every (name, tensor) outside the decoder layers."""
    return ((name, tensor) for name, tensor in iterate_tensors(source) if not _LAYER.match(name))


def write_rounded(
    source: Path,
    out: Path,
    config,
    dtype: torch.dtype,
    tensors: Iterator[tuple[str, torch.Tensor]],
    parts: Callable[[torch.Tensor], dict[str, torch.Tensor]],
) -> int:
    """Write `tensors` with every decoder linear's weight replaced by its `parts`, the rest as `dtype`; one at a time.

    Returns the number of rounded weights. ValueError: a value that `dtype` cannot hold.
    """
    copy_companions(source, out)
    for section in (config, config.text_config, config.vision_config):
        section.dtype = dtype  # what the tensors below are stored in
    config.save_pretrained(out)
    count = 0

    def rounded() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal count
        for name, tensor in tensors:
            if tensor.dim() == 2 and name.endswith(".weight") and _LAYER.match(name):
                count += 1
                for part, value in parts(tensor).items():
                    yield name.removesuffix("weight") + part, value
                release()
            else:
                yield name, cast_tensor(name, tensor, dtype)

    write_tensors(out, rounded(), SHARD_BYTES)
    return count


def cast_tensor(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor as `dtype` if it holds floats; ValueError if a value is too large for it."""
    if not tensor.is_floating_point():
        return tensor
    cast = tensor.to(dtype)
    if not torch.isfinite(cast.sum(dtype=torch.float64)):
        raise ValueError(f"{name!r} has a value that {dtype} cannot hold (or that is NaN).")
    return cast


def check_rounded(out: Path, config, settings: QuantizeSettings) -> dict:
    """Check that a quantizer rounded the decoder's linears and nothing else, and return facts about the checkpoint.

    (actors.gate.files.check_kept checks that the other tensors are unchanged, bit for bit.) Returns {linears,
    rounded_weights, bits_per_weight (with scales and all else that is stored for it; where simulated, by the
    layout's linear_bytes), simulated, nominal_bytes (the whole checkpoint at those bits: the stored bytes, unless
    simulated)}. RuntimeError: a library rounded what it must not.
    """
    shapes = linear_shapes(config)
    stem = re.compile(rf"^(.*\.({'|'.join(map(re.escape, shapes))}))\.(?!bias$)")
    stored: dict[str, int] = {}
    for name, tensor in iterate_tensors(out):
        if _LAYER.match(name):
            if match := stem.match(name):
                stored[match[1]] = stored.get(match[1], 0) + tensor.numel() * tensor.element_size()
        elif tensor.dtype not in (torch.float16, torch.bfloat16):
            raise RuntimeError(f"{settings.method} stored {name!r} as {tensor.dtype}: it must keep 16 bits.")
    layers = config.text_config.num_hidden_layers
    if len(stored) != layers * len(shapes):
        raise RuntimeError(f"The checkpoint holds {len(stored)} decoder linears, not {layers} x {len(shapes)}.")
    weights = layers * sum(outputs * inputs for outputs, inputs in shapes.values())
    held = sum(stored.values())
    bits = 8 * held / weights
    if settings.simulated:
        nominal = find_method(settings.method).layout.linear_bytes
        sizes = (nominal(settings.bits, settings.group_size, *shape) for shape in shapes.values())
        bits = 8 * layers * sum(sizes) / weights
    return {
        "linears": len(stored),
        "rounded_weights": weights,
        "bits_per_weight": bits,
        "simulated": settings.simulated,
        "nominal_bytes": round(stored_bytes(str(out)) - held + weights * bits / 8),
    }
