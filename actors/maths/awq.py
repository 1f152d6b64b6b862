"""Activation-aware weight quantization (Lin et al. 2024, arXiv 2306.00978; paper eq. 6-8): scales and clipping.

A linear's output W x is computed as Q(W diag(s)) (diag(s)^-1 x): inputs that are large on average get a finer grid.
Shapes: x [tokens, in] is a linear's input, W [out, in] its weight, s [in].
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from actors.maths.rounding import dequantize, round_to_nearest

ALPHAS = 20  # alpha = 0, .05, ..., .95
SHRINKS = 10  # limit = max, .95 max, ..., .55 max
SMALLEST = 1e-4
ROWS = 1024  # outputs that are rounded at once: intermediate results are several times as large as the weight


def scale_grid(mean: Float[Tensor, "in"]) -> Float[Tensor, "alphas in"]:
    """Return s = mean^alpha / sqrt(max s * min s) for every alpha (eq. 8); `mean` is mean |X| per input channel."""
    alpha = torch.arange(ALPHAS, device=mean.device)[:, None] / ALPHAS
    scales = mean.float().pow(alpha).clamp(min=SMALLEST)
    return scales / (scales.amax(1, keepdim=True) * scales.amin(1, keepdim=True)).sqrt()


def rounded(weight: Float[Tensor, "out in"], group: int, bits: int) -> Float[Tensor, "out in"]:
    """Return Q(W): the weight rounded to nearest and dequantized, in its own type."""
    parts = [dequantize(*round_to_nearest(part, group, bits)).to(weight.dtype) for part in weight.split(ROWS)]
    return torch.cat(parts)


def rounded_with_scale(
    weight: Float[Tensor, "out in"], scale: Float[Tensor, "in"], group: int, bits: int
) -> Float[Tensor, "out in"]:
    """Return Q(W diag(s)) diag(s)^-1: the effective weight for the unscaled input (eq. 6)."""
    return (rounded(weight.float() * scale, group, bits) / scale).to(weight.dtype)


def grid_errors(
    run: Callable[[list[Tensor]], Tensor],
    weights: Sequence[Tensor],
    grid: Float[Tensor, "alphas in"],
    group: int,
    bits: int,
) -> Float[Tensor, "alphas"]:
    """Return the squared error of `run(weights)` under every scale of the grid (eq. 7), summed over the outputs.

    weights: each [out_j, in], of linears that share the input. run: computes the output from such weights. The errors
    of disjoint parts of a calibration set add up.
    """
    exact = run(list(weights))
    errors = [
        (run([rounded_with_scale(weight, scale, group, bits) for weight in weights]) - exact).float().square().sum()
        for scale in grid
    ]
    return torch.stack(errors)


def group_gram(x: Float[Tensor, "tokens in"], group: int) -> Float[Tensor, "groups group group"]:
    """Return the Gram matrix sum_t x_t x_t' of each group of inputs, which determines clipping's error."""
    grouped = x.float().reshape(x.shape[0], -1, group).transpose(0, 1)
    return grouped.mT @ grouped


def best_limit(
    weight: Float[Tensor, "out in"], gram: Float[Tensor, "groups group group"], bits: int
) -> Float[Tensor, "out groups"]:
    """Return, per output and group, the limit of |W| with the least squared error of the group's part of the output.

    Limits: max|W| * (1 - i/20), i = 0..9. With D = Q(clip(W)) - W the error sum_t (D x_t)^2 is D gram D'.
    """
    groups, group, _ = gram.shape
    outputs = weight.shape[0]
    exact = weight.float().reshape(outputs, groups, group)
    largest = exact.abs().amax(dim=-1)
    best, least = largest.clone(), torch.full_like(largest, torch.inf)
    for step in range(SHRINKS):
        limit = largest * (1 - step / (2 * SHRINKS))
        clipped = rounded(clip(exact.flatten(1), limit), group, bits).reshape(exact.shape)
        difference = (clipped - exact).transpose(0, 1)  # [groups, out, group]
        error = ((difference @ gram) * difference).sum(-1).T
        better = error < least
        best, least = torch.where(better, limit, best), torch.where(better, error, least)
    return best


def clip(weight: Float[Tensor, "out in"], limit: Float[Tensor, "out groups"]) -> Float[Tensor, "out in"]:
    """Return the weight with every group clamped to +-limit."""
    bound = limit.to(weight.dtype)[..., None]
    grouped = weight.reshape(*limit.shape, -1)
    return grouped.clamp(-bound, bound).reshape(weight.shape)
