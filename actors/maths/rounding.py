"""Asymmetric rounding in groups of input channels, and the AWQ "gemm" layout that stores 4 bits of it.

W[o, i] is approximated by (q[o, i] - z[o, g]) * s[o, g] with q, z in 0..2^bits - 1 and g = i // group.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

BITS = 4
PER_WORD = 32 // BITS
# The order in which the gemm kernels expect eight neighbouring values in one 32-bit word, lowest bits first.
NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)


def round_to_nearest(
    weight: Float[Tensor, "out in"], group: int, bits: int = BITS
) -> tuple[Int[Tensor, "out in"], Int[Tensor, "out groups"], Float[Tensor, "out groups"]]:
    """Return (q, zero, scale) of a weight: min-max range per group of `group` inputs, scales rounded to float16.

    ValueError: the inputs do not divide into groups, the outputs do not divide by eight, or a scale is not finite.
    """
    outputs, inputs = weight.shape
    if inputs % group or outputs % PER_WORD:
        raise ValueError(
            f"A weight of {outputs} x {inputs} cannot be stored in groups of {group}: the group size must divide its "
            f"inputs, and {PER_WORD} its outputs. Choose another quantize.group_size."
        )
    grouped = weight.float().reshape(outputs, inputs // group, group)
    low = grouped.amin(dim=-1).clamp(max=0)
    high = grouped.amax(dim=-1).clamp(min=0)
    top = 2**bits - 1
    scale = ((high - low) / top).clamp(min=1e-5).to(torch.float16)
    if not torch.isfinite(scale).all():
        raise ValueError("A weight's range exceeds float16, or is NaN: its scale cannot be stored.")
    exact = scale.float()
    zero = (-low / exact).round().clamp(0, top)
    q = (grouped / exact[..., None]).round().add(zero[..., None]).clamp(0, top)
    return q.reshape(outputs, inputs).int(), zero.int(), scale


def dequantize(
    q: Int[Tensor, "out in"], zero: Int[Tensor, "out groups"], scale: Float[Tensor, "out groups"]
) -> Float[Tensor, "out in"]:
    """Return (q - zero) * scale in float32."""
    group = q.shape[1] // zero.shape[1]
    return (q - zero.repeat_interleave(group, 1)).float() * scale.float().repeat_interleave(group, 1)


def pack(values: Int[Tensor, "rows cols"]) -> Int[Tensor, "rows words"]:
    """Pack 4-bit values of eight neighbouring columns into one int32, in the gemm order."""
    rows, columns = values.shape
    words = values.long().reshape(rows, columns // PER_WORD, PER_WORD)[:, :, list(NIBBLES)]
    shifts = torch.arange(PER_WORD, device=values.device) * BITS
    packed = (words << shifts).sum(dim=-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def unpack(words: Int[Tensor, "rows words"]) -> Int[Tensor, "rows cols"]:
    """Invert `pack`."""
    shifts = torch.arange(PER_WORD, device=words.device) * BITS
    nibbles = (words.long()[..., None] >> shifts) & (2**BITS - 1)
    values = torch.empty_like(nibbles)
    values[..., list(NIBBLES)] = nibbles
    return values.flatten(1).int()


def gemm_tensors(weight: Float[Tensor, "out in"], group: int) -> dict[str, Tensor]:
    """Round a weight and return {qweight, qzeros, scales} as AWQ checkpoints store them (transposed)."""
    q, zero, scale = round_to_nearest(weight, group)
    return {
        "qweight": pack(q.T.contiguous()),
        "qzeros": pack(zero.T.contiguous()),
        "scales": scale.T.contiguous(),
    }
