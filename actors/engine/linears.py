"""On a CPU, linears with weights laid out once for all products of a call: oneDNN's own layout instead of rows.

A plain product lays its weights out anew every time, which for a few tokens takes as long as the arithmetic. Measured
on one core (docs/LOG.md): a decoder layer's linears 1.1 to 1.6 times faster, the output head 1.3 to 2.2 times.

Linears in AWQ's layout are unpacked once, too. transformers' kernel for a CPU unpacks them at every product, and then
multiplies in float16, which processors without such instructions emulate: 35 to 130 times slower (docs/LOG.md). The
weights are the kernel's, to the bit; the products are more exact than its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from actors.maths.rounding import unpack
from actors.memory import free_bytes

SHARE = 0.25  # of the free memory, at most, for the second copy of the weights
PACKED = "AwqTorchLinear"  # of gptqmodel, for CPUs


@contextmanager
def repacked_linears(model: nn.Module, sharers: int = 1) -> Iterator[None]:
    """Compute linears with repacked weights in the block: in float32 on a CPU, where the free memory allows it.

    For inference only; the weights must not change in the block. sharers: processes that share the machine's memory.
    """
    linears = [each for each in model.modules() if _is_plain(each)]
    if linears:  # else the model computes in 16 bits
        linears += [each for each in model.modules() if _is_packed(each)]
    size = sum(each.in_features * each.out_features * torch.float32.itemsize for each in linears)
    if not torch.backends.mkldnn.is_available() or size > SHARE * free_bytes(torch.device("cpu")) / sharers:
        linears = []
    for linear in linears:
        weight = unpack_weight(linear) if _is_packed(linear) else linear.weight.detach()
        bias = None if linear.bias is None else linear.bias.float()
        weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        linear.forward = partial(_multiply, weight, bias)
    try:
        yield
    finally:
        for linear in linears:
            del linear.forward


def unpack_weight(linear: nn.Module) -> torch.Tensor:
    """Return the weight [out, in] of a linear in AWQ's layout, in float32: rounded to float16, as the kernel does."""
    group = linear.in_features // len(linear.scales)
    zeros = unpack(linear.qzeros).repeat_interleave(group, 0)
    scales = linear.scales.half().repeat_interleave(group, 0)
    return ((unpack(linear.qweight) - zeros) * scales).T.float().contiguous()


def _is_plain(module: nn.Module) -> bool:
    if type(module) is not nn.Linear or "forward" in vars(module):  # a forward of its own: a hook that moves tensors
        return False
    return module.weight.dtype == torch.float32 and module.weight.device.type == "cpu"


def _is_packed(module: nn.Module) -> bool:
    if type(module).__name__ != PACKED or "forward" in vars(module):
        return False
    return module.bits == 4 and module.qweight.device.type == "cpu"


def _multiply(weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
