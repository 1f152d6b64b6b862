"""What a device can do at best: matrix products and memory, measured, and the floor that they set."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from actors.engine.linears import repacked_linears


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds that `run` takes until the device is done, and its result."""
    _synchronise()
    start = time.perf_counter()
    found = run()
    _synchronise()
    return time.perf_counter() - start, found


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def floor_s(layer, token_layers: float, readings: float, cached_bytes: float = 0) -> float:
    """Return the least seconds for passing `token_layers` tokens through a decoder layer like `layer`.

    readings: how often the weights of such a layer are read while answers are decoded; cached_bytes: keys and values
    read meanwhile. The passes run at the measured matmul rate, the readings at the measured memory bandwidth.
    """
    weights = [p.detach() for p in layer.parameters() if p.dim() == 2]
    flops = 2 * sum(p.numel() for p in weights) * token_layers
    read = readings * sum(p.numel() * p.element_size() for p in weights) + cached_bytes
    return flops / matmul_rate(weights) + read / bandwidth(weights[0].device)


@torch.inference_mode()
def matmul_rate(weights: list[torch.Tensor]) -> float:
    """Return the floating point operations per second of products over 4096 tokens, with plain or repacked weights."""
    linears = nn.ModuleList(nn.Linear(p.shape[1], p.shape[0], bias=False, device="meta") for p in weights)
    for linear, part in zip(linears, weights, strict=True):
        linear.weight = nn.Parameter(part, requires_grad=False)
    x = {p.shape[1]: torch.randn(4096, p.shape[1], device=p.device, dtype=p.dtype) for p in weights}

    def best() -> float:
        return min(timed(lambda: [linear(x[linear.in_features]) for linear in linears])[0] for _ in range(20))

    plain = best()
    with repacked_linears(linears):
        return 2 * 4096 * sum(p.numel() for p in weights) / min(plain, best())


def bandwidth(device: torch.device) -> float:
    """Return the bytes per second of a sum over a large block."""
    block = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device)
    return block.numel() * block.element_size() / min(timed(block.sum)[0] for _ in range(5))
