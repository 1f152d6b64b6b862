"""The systematic error of rounded weights: whether they are as large as before, block by block.

Sound rounding moves weights both ways; a wrong scale makes all weights that share it larger or smaller. With few bits
that is less than the rounding error, so the error's direction must tell, not its size. Both w' (rounded) and w have
errors as regressors, and the two regressions, w' on w and w on w', bracket the slope (Frisch 1934):

    low = w'.w / w.w  <=  high = w'.w' / w'.w

Rounding to nearest has low = 1 where the values are spread evenly, high = 1 where each level is the mean of what is
rounded to it (about so in NF4); next to a large value the others are rounded to 0, which lowers `low` alone. A scale f
times too large multiplies both by f.
"""

import torch
from jaxtyping import Float
from torch import Tensor

FLOOR = 1e-3  # of the root mean square of all weights: a block of smaller weights has a slope near 1


def slopes(after: Float[Tensor, "blocks n"], before: Float[Tensor, "blocks n"]) -> Float[Tensor, "blocks"]:
    """Return each block's slope of `after` on `before`: the one nearest to 1 of those the two regressions bracket.

    Every block gets one more value, FLOOR of an average block's norm, rounded to itself: so a block of zeros gives 1.
    Where `after` and `before` point in opposite directions it is the slope of after on before, which is negative.
    """
    floor = before.square().mean() * before.shape[1] * FLOOR**2
    product = (after * before).sum(1) + floor
    low = product / (before.square().sum(1) + floor)
    high = torch.where(product > 0, (after.square().sum(1) + floor) / product, low)
    return torch.ones_like(low).clamp(min=low, max=torch.maximum(low, high))
