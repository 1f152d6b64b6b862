"""On a CPU, linears with weights laid out once for all products of a call: oneDNN's own layout instead of rows.

A plain product lays its weights out anew every time, which for a few tokens takes as long as the arithmetic. Measured
on one core (docs/LOG.md): a decoder layer's linears 1.1 to 1.6 times faster, the output head 1.3 to 2.2 times.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from actors.memory import free_bytes

SHARE = 0.25  # of the free memory, at most, for the second copy of the weights


@contextmanager
def repacked_linears(model: nn.Module, sharers: int = 1) -> Iterator[None]:
    """Compute linears with repacked weights in the block: those in float32 on a CPU, where the free memory allows it.

    For inference only; the weights must not change in the block. sharers: processes that share the machine's memory.
    """
    linears = [each for each in model.modules() if _is_plain(each)]
    size = sum(each.weight.numel() * each.weight.element_size() for each in linears)
    if not torch.backends.mkldnn.is_available() or size > SHARE * free_bytes(torch.device("cpu")) / sharers:
        linears = []
    for linear in linears:
        weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        linear.forward = partial(_multiply, weight, linear.bias)
    try:
        yield
    finally:
        for linear in linears:
            del linear.forward


def _is_plain(module: nn.Module) -> bool:
    if type(module) is not nn.Linear or "forward" in vars(module):  # a forward of its own: a hook that moves tensors
        return False
    return module.weight.dtype == torch.float32 and module.weight.device.type == "cpu"


def _multiply(weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
