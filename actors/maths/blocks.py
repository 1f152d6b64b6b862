"""GGML's block of 4-bit weights with a minimum, made of codes that exist already."""

import numpy as np
from jaxtyping import Float, Int, UInt8

BLOCK = 32  # weights of one block


def q4_1_blocks(
    codes: Int[np.ndarray, "out in"], zeros: Int[np.ndarray, "out groups"], scales: Float[np.ndarray, "out groups"]
) -> UInt8[np.ndarray, "out bytes"]:
    """Return the Q4_1 blocks that hold (code - zero) * scale, with 20 bytes for 32 weights: scale d, minimum m, codes.

    d * code + m is that number for d = scale and m = -zero * scale, up to the rounding of m to float16. Byte i has the
    codes i (low) and i + 16. ValueError: a group is not made of whole blocks.
    """
    outputs, inputs = codes.shape
    group = inputs // scales.shape[1]
    if group % BLOCK:
        raise ValueError(f"Groups of {group} weights are not made of whole blocks of {BLOCK}.")
    per_group = group // BLOCK
    scale = np.repeat(scales.astype(np.float32), per_group, axis=1)
    low = -np.repeat(zeros, per_group, axis=1).astype(np.float32) * scale
    halves = codes.reshape(outputs, inputs // BLOCK, 2, BLOCK // 2).astype(np.uint8)
    nibbles = halves[:, :, 0] | (halves[:, :, 1] << 4)
    heads = np.stack([scale, low], axis=-1).astype(np.float16).view(np.uint8)
    return np.concatenate([heads, nibbles], axis=-1).reshape(outputs, -1)
