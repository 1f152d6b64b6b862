"""Bytes of rounded weights, keys and values, and working memory: the formulas of actors.estimate.

They count the bytes allocated at one moment, not what the allocator keeps in reserve (fragments, rounding up).
Working memory is that of transformers' eager modules with fused attention (sdpa), which holds no [tokens, tokens]
scores; tests compare it with a trace of every allocation of transformers' own modules.
"""

import json
from collections.abc import Sequence

HQQ_ROWS = {8: 1, 4: 2, 3: 10, 2: 4}  # groups of which hqq packs one value each into a word
_NF4_LEVELS = 16
_SCALE = 2  # bytes of a stored float16 scale
_SHAPE = 16  # bytes of the compressed-tensors layout's weight_shape: two int64

# The bytes of one linear's weight [outputs, inputs] in each layout, with all that is stored for it.


def gemm_bytes(bits: int, group: int, outputs: int, inputs: int) -> int:
    """AWQ's gemm layout: a float16 scale and a zero point of `bits` bits per group. Nominal where `bits` is not 4."""
    weights = outputs * inputs
    groups = weights // group
    return -(-(weights * bits + groups * bits) // 8) + _SCALE * groups


def compressed_tensors_bytes(bits: int, group: int, outputs: int, inputs: int) -> int:
    """compressed-tensors' pack-quantized layout: whole words of 32 // bits values, for weights and zero points."""
    columns, per_word = inputs // group, 32 // bits
    words = outputs * -(-inputs // per_word) + columns * -(-outputs // per_word)
    return 4 * words + _SCALE * outputs * columns + _SHAPE


def nf4_bytes(bits: int, block: int, outputs: int, inputs: int) -> int:
    """bitsandbytes' NF4: a float32 scale per block, the 16 levels, and the description that bitsandbytes stores."""
    weights = outputs * inputs
    facts = {"quant_type": "nf4", "blocksize": block, "dtype": "float16", "shape": [outputs, inputs]}
    return -(-weights * bits // 8) + 4 * -(-weights // block) + 4 * _NF4_LEVELS + len(json.dumps(facts))


def int8_bytes(bits: int, group: int, outputs: int, inputs: int) -> int:
    """bitsandbytes' LLM.int8: a float32 scale per output, and a byte that names the format."""
    return outputs * inputs * bits // 8 + 4 * outputs + 1


def hqq_bytes(bits: int, group: int, outputs: int, inputs: int) -> int:
    """hqq's own packing: words of values from several groups, a 16-bit scale and zero point per group."""
    groups, word = outputs * inputs // group, 4 if bits == 3 else 1
    return word * group * -(-groups // HQQ_ROWS[bits]) + 2 * _SCALE * groups


def mlp_copies(activation: str, gated: bool) -> int:
    """Return how many [tokens, intermediate] tensors an MLP holds at once: x and act(x); a gate's product is one more.

    quick_gelu, x * sigmoid(1.702 x), and gelu_new, by powers and tanh, hold their parts, too.
    """
    return {"quick_gelu": 3, "gelu_new": 4}.get(activation, 2) + gated


def cached_tokens(prompt: int, new_tokens: int, window: int | None) -> int:
    """Return the tokens whose keys and values a layer holds at an answer's end, in its sliding window if it has one.

    The last new token is never fed to the model, so it has none.
    """
    tokens = prompt + max(new_tokens - 1, 0)
    return tokens if window is None else min(tokens, window)


def tower_bytes(images: int, tokens: int, hidden: int, intermediate: int, copies: int, itemsize: int) -> int:
    """Return the bytes of the vision tower's peak, which is in an MLP.

    tokens: of one image, class token included; copies: [tokens, intermediate] tensors alive at once. Four [tokens,
    hidden] are alive: the states that are selected and handed on, the residual and its norm.
    """
    return images * tokens * (copies * intermediate + 4 * hidden) * itemsize


def prefill_bytes(
    rows: int, tokens: int, hidden: int, intermediate: int, copies: int, head: int, masked: bool, itemsize: int
) -> int:
    """Return a decoder layer's peak bytes in prefill, in its MLP or its attention, without keys and values.

    copies: [rows, tokens, intermediate] tensors alive at once in the MLP. Four [rows, tokens, hidden] are always alive:
    the embeddings, the layer's input, the residual after attention and its norm; and the rotary cosines and sines.
    masked: a mask is needed (padding, or a sliding window): a byte per entry, which attention converts to the
    activations' type.
    """
    mask = rows * tokens * tokens * masked
    mlp = rows * tokens * copies * intermediate * itemsize
    attention = rows * tokens * 4 * hidden * itemsize + mask * itemsize
    return rows * tokens * (4 * hidden + 2 * head) * itemsize + mask + max(mlp, attention)


def logit_bytes(rows: int, vocabulary: int, itemsize: int) -> int:
    """Return the bytes that choosing a token takes: the last logits, their float32 copy, and that without stops."""
    return rows * vocabulary * (itemsize + 8)


def largest_share(parts: Sequence[int], devices: int) -> int:
    """Return the smallest possible load of the fullest of `devices` when `parts` are placed on them in order."""
    low, high = max(parts), sum(parts)
    while low < high:
        share = (low + high) // 2
        if _devices_needed(parts, share) <= devices:
            high = share
        else:
            low = share + 1
    return low


def _devices_needed(parts: Sequence[int], share: int) -> int:
    needed, held = 1, 0
    for part in parts:
        if held + part > share:
            needed, held = needed + 1, 0
        held += part
    return needed
