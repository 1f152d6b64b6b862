"""What the gate checks of the scales of rounded weights: that no block of a linear is larger or smaller than before."""

from dataclasses import dataclass
from itertools import chain

import torch
from torch import nn

from actors.maths.slopes import slopes
from actors.specs import GateError

FEED = 512  # inputs whose columns are read off a linear at once
# Largest distance of a slope from 1, of a whole linear and of one block, by method and bits. Sound ones have shown at
# most .004 (4 bits), .0003 (8), .008 (3) and .04 (hqq with 2) of a linear, .075, .0045, .15 and .37 of a block: the
# tests' models (derm-tiny with its outliers, and four architectures), and 1024 x 1024 random weights (normal,
# Student's t with 5 and 3 degrees of freedom, 1 % ten and .5 % thirty times as large, input channels divided by 50),
# in groups of 8 to 128. The bounds of linears are at least twice as large; those of blocks far more, as a model of 7B
# has 10^8 of them, and none may be refused that is sound. With 2 bits sound linears and scales that are 20 % too
# small overlap.
SLOPES = {
    ("nf4", 4): (0.02, 0.5),
    ("int8", 8): (0.005, 0.1),
    ("hqq", 8): (0.005, 0.1),
    ("hqq", 4): (0.02, 0.5),
    ("hqq", 3): (0.04, 0.7),
    ("hqq", 2): (0.08, 0.9),
    ("rtn", 8): (0.005, 0.1),
    ("rtn", 3): (0.04, 0.7),
    ("rtn", 2): (0.06, 0.9),
}


@dataclass(frozen=True)
class Rounding:
    """A method, its bits, and how many weights of an output share a scale (None: all)."""

    method: str
    bits: int
    block: int | None


def check_scales(name: str, module: nn.Module, weight: torch.Tensor, rounding: Rounding, dtype: torch.dtype) -> float:
    """Refuse a linear whose weights, or some blocks of them, are systematically larger or smaller than `weight`.

    weight: [out, in], before rounding. dtype: of what the linear is given. Returns how far the slope of the whole
    linear is from 1; GateError names it.
    """
    own = computed_weight(module, weight.shape[1], dtype)
    before = weight.to(own.device).float()
    whole, one = SLOPES[rounding.method, rounding.bits]
    wrong = f"{name!r} does not compute with the weight before rounding: its scales are off."
    slope = float(slopes(own.reshape(1, -1), before.reshape(1, -1)))
    if not abs(slope - 1) <= whole:
        raise GateError(f"{wrong} Its weights are {slope:.2g} times as large (allowed: 1 +- {whole:g}).")
    block = rounding.block or weight.shape[1]
    found = slopes(_blocks(own, block), _blocks(before, block))
    off = ~((found - 1).abs() <= one)
    if off.any():
        first = int(off.nonzero()[0])
        raise GateError(
            f"{wrong} In {int(off.sum())} of {len(found)} blocks of {block} weights they are not as large as they "
            f"were: {float(found[first]):.2g} times in the first, of output {first * block // weight.shape[1]} "
            f"(allowed: 1 +- {one:g})."
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
    """Return a weight's values, output by output, as [blocks, block]; zeros fill the last."""
    return nn.functional.pad(weight.flatten(), (0, -weight.numel() % block)).view(-1, block)
