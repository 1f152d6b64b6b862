"""The formulas of the estimate, by hand and against naive references."""

import itertools

import pytest

from actors.maths.sizes import (
    cached_tokens,
    largest_share,
    logit_bytes,
    mlp_copies,
    prefill_bytes,
    tower_bytes,
)
from actors.quantizers.table import layouts

LAYOUT = {layout.name: layout for layout in layouts()}

# By the layout's name (not the method's: two methods may share one) and bits.
# 64 outputs x 128 inputs: 8,192 weights in 128 groups of 64
BY_HAND = {
    ("awq", 4): 4096 + 128 * 2 + 64,  # nibbles; a float16 scale and half a byte of zero a group
    ("awq", 3): 8192 * 3 // 8 + 128 * 2 + 48,
    ("awq", 8): 8192 + 128 * 2 + 128,
    ("nf4", 4): 4096 + 128 * 4 + 16 * 4 + 78,  # float32 scales, 16 levels, and a description of 78 letters
    ("int8", 8): 8192 + 64 * 4 + 1,
    ("hqq", 4): 4096 + 128 * 4,
    ("hqq", 2): 2048 + 128 * 4,
    ("hqq", 8): 8192 + 128 * 4,
    ("mixed", 4): 4096 + 128 * 2 + 64 + 16,  # as awq, and two int64 of shape
    ("mixed", 3): 64 * 13 * 4 + 128 * 2 + 2 * 7 * 4 + 16,  # ten values a word, of a row and of a column of zeros
    ("hqq", 3): 13 * 64 * 4 + 128 * 4,  # ten groups a word: 128 groups take 13 rows of 64 words
}


@pytest.mark.parametrize(("kind", "expected"), BY_HAND.items())
def test_a_linear_by_hand(kind, expected):
    name, bits = kind
    assert LAYOUT[name].linear_bytes(bits, 64, 64, 128) == expected


def test_bits_of_a_large_linear():
    """4 + 16/64 + 4/64 = 4.3125 bits; nf4 4 + 32/64 = 4.5 and 140 bytes."""
    weights = 4096 * 11008
    awq, nf4 = LAYOUT["awq"].linear_bytes, LAYOUT["nf4"].linear_bytes
    assert awq(4, 64, 4096, 11008) == weights * 4.3125 / 8
    assert 0 < nf4(4, 64, 4096, 11008) - weights * 4.5 / 8 < 200
    assert awq(4, 128, 4096, 11008) == weights * (4 + 20 / 128) / 8


def test_cached_tokens():
    """The last new token is never fed; a window keeps the latest."""
    assert cached_tokens(50, 32, None) == 81 and cached_tokens(50, 1, None) == 50
    assert cached_tokens(50, 32, 60) == 60 and cached_tokens(50, 2, 60) == 51


@pytest.mark.parametrize("devices", [1, 2, 3, 4, 9])
def test_largest_share_is_the_best_cut(devices):
    """Against every way to cut the row."""
    parts = [7, 2, 2, 9, 4, 1, 8]
    cuts = itertools.combinations(range(1, len(parts)), min(devices, len(parts)) - 1)
    best = min(max(sum(parts[a:b]) for a, b in itertools.pairwise((0, *cut, len(parts)))) for cut in cuts)
    assert largest_share(parts, devices) == best


def test_working_memory_by_hand():
    """2 images of 5 tokens, width 8, mlp 16; 3 rows of 10 tokens, width 8, mlp 32, heads of 4; vocabulary 100."""
    assert tower_bytes(2, 5, 8, 16, 3, 2) == 2 * 5 * (3 * 16 + 4 * 8) * 2
    assert prefill_bytes(3, 10, 8, 32, 3, 4, False, 2) == 30 * (3 * 32 + 4 * 8 + 2 * 4) * 2
    assert prefill_bytes(3, 10, 8, 32, 3, 4, True, 2) == 30 * (3 * 32 + 4 * 8 + 2 * 4) * 2 + 300
    long = prefill_bytes(1, 1000, 8, 32, 3, 4, True, 2)  # the mask in the activations' type is more than the mlp
    assert long == 1000 * (4 * 8 + 2 * 4) * 2 + 10**6 + 1000 * 4 * 8 * 2 + 2 * 10**6
    assert logit_bytes(3, 100, 2) == 300 * 10
    assert [mlp_copies(name, True) for name in ("silu", "quick_gelu", "gelu_new")] == [3, 4, 5]
    unpacked = {"awq": 64, "nf4": 64, "hqq": 192, "int8": 0}
    assert {name: LAYOUT[name].unpacked_bytes(4 * 8, 2) for name in unpacked} == unpacked
