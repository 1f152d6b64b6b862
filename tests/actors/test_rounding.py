"""4-bit rounding and the AWQ gemm layout, against naive loops, hand-computed words, and autoawq itself."""

import math
import warnings

import pytest
import torch

from actors.maths.rounding import dequantize, gemm_tensors, pack, round_to_nearest, unpack


def naive_round(row: list[float]) -> tuple[list[int], int, float]:
    """Round one group in float64: the scale is float16, zero is a whole number, both ends are reachable."""
    low, high = min(min(row), 0.0), max(max(row), 0.0)
    scale = float(torch.tensor(max((high - low) / 15, 1e-5)).half())
    zero = min(15, max(0, round(-low / scale)))
    return [min(15, max(0, round(value / scale) + zero)) for value in row], zero, scale


def weight(outputs: int = 8, inputs: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("group", [4, 16, 32])
@pytest.mark.parametrize("shift", [0.0, 3.0, -3.0])
def test_rounding_against_a_naive_loop(group, shift):
    """Centred, all positive and all negative weights; q, zero and scale are equal, group by group."""
    values = weight() + shift
    q, zero, scale = round_to_nearest(values, group)
    for o in range(8):
        for g in range(32 // group):
            part = slice(g * group, (g + 1) * group)
            expected = naive_round(values[o, part].double().tolist())
            assert (q[o, part].tolist(), int(zero[o, g]), float(scale[o, g])) == expected


def test_rounding_by_hand():
    """[-1, 0, 0.5, 2]: range 3, scale 0.2 (0.199951 in float16), zero 5: q = 0, 5, 8, 15."""
    values = torch.zeros(8, 4)
    values[0] = torch.tensor([-1.0, 0.0, 0.5, 2.0])
    q, zero, scale = round_to_nearest(values, 4)
    assert float(scale[0, 0]) == 0.199951171875 and int(zero[0, 0]) == 5
    assert q[0].tolist() == [0, 5, 8, 15]  # 0.5 / 0.19995 = 2.5006, rounds to 3
    expected = [-5 * 0.199951171875, 0.0, 3 * 0.199951171875, 10 * 0.199951171875]
    assert dequantize(q, zero, scale)[0].tolist() == pytest.approx(expected, abs=1e-7)


def test_halves_round_to_even_before_zero_is_added():
    """[-1, 0.5, 2.5, 14]: scale 1, zero 1; as in autoawq q = round(w / s) + z = 0, 0 + 1, 2 + 1, 15."""
    values = torch.zeros(8, 4)
    values[0] = torch.tensor([-1.0, 0.5, 2.5, 14.0])
    q, zero, scale = round_to_nearest(values, 4)
    assert float(scale[0, 0]) == 1 and int(zero[0, 0]) == 1 and q[0].tolist() == [0, 1, 3, 15]


def test_dequantize_against_a_naive_loop():
    """(q - zero) * scale, element by element in float64."""
    q, zero, scale = round_to_nearest(weight(), 16)
    found = dequantize(q, zero, scale)
    for o in range(8):
        for i in range(32):
            expected = (int(q[o, i]) - int(zero[o, i // 16])) * float(scale[o, i // 16])
            assert math.isclose(float(found[o, i]), expected, rel_tol=1e-6, abs_tol=1e-9)


def test_error_is_at_most_half_a_step():
    """Inside the range, no value is further from its code than half a scale (and float16's rounding of it)."""
    values = weight(16, 128)
    q, zero, scale = round_to_nearest(values, 64)
    step = scale.float().repeat_interleave(64, 1)
    assert ((dequantize(q, zero, scale) - values).abs() <= step * (0.5 + 15 * 2**-11) + 1e-6).all()
    assert int(q.min()) == 0 and int(q.max()) == 15


def test_zero_weights_stay_zero():
    """A group of zeros must not divide by zero."""
    q, zero, scale = round_to_nearest(torch.zeros(8, 8), 8)
    assert dequantize(q, zero, scale).abs().max() == 0


def test_one_packed_word_by_hand():
    """Values 0..7 in the order 0 2 4 6 1 3 5 7, lowest bits first, are 0x75316420."""
    assert pack(torch.arange(8)[None]).tolist() == [[0x75316420]]
    assert unpack(torch.tensor([[0x75316420]], dtype=torch.int32)).tolist() == [list(range(8))]


def test_words_with_the_highest_bit():
    """Values of 15 fill a word: -1 as a signed 32-bit number; a last value of 8 alone is -2^31."""
    assert pack(torch.full((1, 8), 15)).tolist() == [[-1]]
    assert pack(torch.tensor([[0, 0, 0, 0, 0, 0, 0, 8]])).tolist() == [[-(2**31)]]


def test_pack_and_unpack_are_inverse():
    """Both ways, with every bit in use."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randint(0, 16, (5, 48), generator=generator, dtype=torch.int32)
    assert torch.equal(unpack(pack(values)), values)
    words = torch.randint(-(2**31), 2**31, (7, 3), generator=generator).int()
    assert torch.equal(pack(unpack(words)), words)


def packing_utils():
    """autoawq's own packing, of which ours must be the inverse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("awq.utils.packing_utils")


def test_autoawq_unpacks_our_words():
    """autoawq's unpacking and reordering give our q and zero, bit for bit."""
    awq = packing_utils()
    values = weight(16, 64)
    q, zero, _ = round_to_nearest(values, 32)
    tensors = gemm_tensors(values, 32)
    assert tensors["qweight"].shape == (64, 2) and tensors["qzeros"].shape == (2, 2)
    iweight, izeros = awq.unpack_awq(tensors["qweight"], tensors["qzeros"], 4)
    iweight, izeros = awq.reverse_awq_order(iweight, izeros, 4)
    assert torch.equal((iweight & 15).int(), q.T)
    assert torch.equal((izeros & 15).int(), zero.T)


def test_autoawq_dequantizes_our_tensors():
    """autoawq's (q - z) * s in float16 is our float32 one, rounded once."""
    awq = packing_utils()
    values = weight(16, 64)
    tensors = gemm_tensors(values, 32)
    theirs = awq.dequantize_gemm(tensors["qweight"], tensors["qzeros"], tensors["scales"], 4, 32)
    assert theirs.dtype == torch.float16
    assert torch.equal(theirs.T, dequantize(*round_to_nearest(values, 32)).half())


@pytest.mark.parametrize(("outputs", "inputs", "group"), [(8, 60, 64), (8, 96, 64), (12, 64, 64)])
def test_sizes_that_do_not_divide(outputs, inputs, group):
    """The message gives the sizes and names the setting to change."""
    with pytest.raises(ValueError, match=rf"{outputs} x {inputs} cannot.*groups of {group}.*quantize\.group_size"):
        round_to_nearest(torch.zeros(outputs, inputs), group)


def test_range_beyond_float16():
    """A scale above 65,504 would be stored as infinity."""
    values = torch.zeros(8, 8)
    values[0, 0] = 1e6 * 15
    with pytest.raises(ValueError, match="exceeds float16"):
        round_to_nearest(values, 8)
