"""Checks the scales of rounded weights, for the gate: no block of a linear may be larger or smaller than before."""

from dataclasses import dataclass
from itertools import chain

import torch
from torch import nn

from actors.maths.slopes import slopes
from actors.specs import GateError

FEED = 512  # columns of a linear's weight that are computed at once


@dataclass(frozen=True)
class Rounding:
    """How a linear was rounded.

    slopes: largest distance of a slope from 1, of the whole linear and of one block (actors.quantizers.table). block:
    how many weights of an output share a scale (None: all).
    """

    slopes: tuple[float, float]
    block: int | None


def check_scales(name: str, module: nn.Module, weight: torch.Tensor, rounding: Rounding, dtype: torch.dtype) -> float:
    """Refuse a linear whose weights, or some blocks of them, are systematically larger or smaller than `weight`.

    weight: [out, in], before rounding. dtype: of the linear's input. Returns the distance of the whole linear's slope
    from 1; GateError names the linear.
    """
    weight_now = computed_weight(module, weight.shape[1], dtype)
    before = weight.to(weight_now.device).float()
    linear_bound, block_bound = rounding.slopes
    wrong = f"{name!r} does not compute with the weight before rounding: its scales are off."
    slope = float(slopes(weight_now.reshape(1, -1), before.reshape(1, -1)))
    if not abs(slope - 1) <= linear_bound:
        raise GateError(f"{wrong} Its weights are {slope:.2g} times as large (allowed: 1 +- {linear_bound:g}).")
    block = rounding.block or weight.shape[1]
    block_slopes = slopes(_blocks(weight_now, block), _blocks(before, block))
    off = ~((block_slopes - 1).abs() <= block_bound)
    if off.any():
        first = int(off.nonzero()[0])
        raise GateError(
            f"{wrong} In {int(off.sum())} of {len(block_slopes)} blocks of {block} weights they are not as large as "
            f"they were: {float(block_slopes[first]):.2g} times in the first, of output "
            f"{first * block // weight.shape[1]} (allowed: 1 +- {block_bound:g})."
        )
    return abs(slope - 1)


@torch.inference_mode()
def computed_weight(module: nn.Module, inputs: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the weight [out, in] that a linear computes with, whatever its format: its outputs for unit vectors."""
    device = next(chain(module.parameters(), module.buffers())).device
    bias, module.bias = module.bias, None  # a large one would round the weights away
    try:
        columns = []
        for start in range(0, inputs, FEED):
            units = torch.zeros(min(FEED, inputs - start), inputs, dtype=dtype, device=device)
            units.diagonal(start).fill_(1)
            columns.append(module(units).float())
    finally:
        module.bias = bias
    return torch.cat(columns).T


def _blocks(weight: torch.Tensor, block: int) -> torch.Tensor:
    """Return a weight's values, output by output, as [blocks, block], padded with zeros."""
    return nn.functional.pad(weight.flatten(), (0, -weight.numel() % block)).view(-1, block)
