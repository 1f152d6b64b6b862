"""The formulas of AWQ against loops in float64 over single numbers."""

import math

import numpy as np
import pytest
import torch

from actors.maths.awq import best_limit, clip, grid_errors, group_gram, rounded, rounded_with_scale, scale_grid

GROUP = 8


@pytest.fixture
def data():
    """A weight [16, 24] and inputs [50, 24] of which two channels are ten times the others."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(16, 24, generator=generator)
    x = torch.randn(50, 24, generator=generator)
    x[:, [5, 17]] *= 10
    return weight, x


def naively_rounded(row: np.ndarray, bits: int) -> np.ndarray:
    """Round one group of one output: min-max range that includes zero, scale in float16."""
    top = 2**bits - 1
    low, high = min(row.min(), 0.0), max(row.max(), 0.0)
    scale = float(np.float16(np.float32((high - low) / top)))
    zero = np.clip(np.round(-low / scale), 0, top)
    return (np.clip(np.round(row / scale) + zero, 0, top) - zero) * scale


def naive(weight: np.ndarray, bits: int) -> np.ndarray:
    found = np.empty_like(weight)
    for o in range(weight.shape[0]):
        for start in range(0, weight.shape[1], GROUP):
            found[o, start : start + GROUP] = naively_rounded(weight[o, start : start + GROUP], bits)
    return found


def test_scales_by_hand():
    """Mean inputs 1, 4, 16: alpha 0 gives 1, 1, 1; alpha .5 gives 1, 2, 4 over sqrt(4 * 1)."""
    grid = scale_grid(torch.tensor([1.0, 4.0, 16.0]))
    assert grid.shape == (20, 3)
    assert grid[0].tolist() == [1, 1, 1]
    assert grid[10].tolist() == pytest.approx([0.5, 1, 2])
    for i, alpha in enumerate(np.arange(20) * 0.05):
        raw = [1.0**alpha, 4.0**alpha, 16.0**alpha]
        assert grid[i].tolist() == pytest.approx([value / math.sqrt(max(raw) * min(raw)) for value in raw], rel=1e-5)


def test_a_silent_channel_keeps_a_finite_scale():
    """Mean 0 is taken as 1e-4 after the power: neither zero nor infinity."""
    grid = scale_grid(torch.tensor([0.0, 1.0]))
    assert torch.isfinite(grid).all() and (grid > 0).all()
    assert grid[10].tolist() == pytest.approx([1e-2, 1e2])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounded_is_the_naive_loop(data, bits):
    """2^bits levels per group; fewer bits lose more."""
    weight, _ = data
    assert np.abs(rounded(weight, GROUP, bits).numpy() - naive(weight.double().numpy(), bits)).max() < 1e-5
    levels = {len(set(group.tolist())) for group in rounded(weight, GROUP, bits).reshape(-1, GROUP)}
    assert max(levels) <= min(2**bits, GROUP)


def test_rounding_in_parts_changes_nothing():
    """More rows than are rounded at once."""
    weight = torch.randn(2056, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rounded(weight, 8, 4)[1020:1030], rounded(weight[1016:1032].clone(), 8, 4)[4:14])


@pytest.mark.parametrize("bits", [3, 4])
def test_the_chosen_scale_is_the_naive_search(data, bits):
    """Errors of all 20 scales, and therefore the choice, are those of a float64 loop over eq. 6 to 8."""
    weight, x = data
    w, inputs = weight.double().numpy(), x.double().numpy()
    mean = np.abs(inputs).mean(0)
    expected = []
    for i in range(20):
        scale = np.maximum(mean ** (i / 20), 1e-4)
        scale /= math.sqrt(scale.max() * scale.min())
        expected.append((((inputs / scale) @ naive(w * scale, bits).T - inputs @ w.T) ** 2).sum())
    grid = scale_grid(x.abs().mean(0))
    found = grid_errors(lambda weights: x @ weights[0].T, [weight], grid, GROUP, bits)
    assert found.tolist() == pytest.approx(expected, rel=1e-3)
    best = int(np.argmin(expected))
    assert int(found.argmin()) == best and best > 0
    assert expected[best] < 0.8 * expected[0]
    effective = naive(w * grid[best].double().numpy(), bits) / grid[best].double().numpy()
    assert np.abs(rounded_with_scale(weight, grid[best], GROUP, bits).numpy() - effective).max() < 1e-4


def test_errors_of_parts_add_up(data):
    """Calibration in two parts gives the same errors."""
    weight, x = data
    grid = scale_grid(x.abs().mean(0))
    whole, one, two = (
        grid_errors(lambda w, part=part: part @ w[0].T, [weight], grid, GROUP, 4) for part in (x, x[:20], x[20:])
    )
    assert (one + two).tolist() == pytest.approx(whole.tolist(), rel=1e-5)


def test_clipping_is_the_naive_search(data):
    """For every output and group the limit of ten that errs least on sum_t ((Q(clip(w)) - w) x_t)^2, in float64."""
    weight, x = data
    w, inputs = weight.double().numpy(), x.double().numpy()
    limits = best_limit(weight, group_gram(x, GROUP), 3).double().numpy()
    picked = set()
    for o in range(w.shape[0]):
        for g in range(w.shape[1] // GROUP):
            part = slice(g * GROUP, (g + 1) * GROUP)
            row, share, largest = w[o, part], inputs[:, part], np.abs(w[o, part]).max()

            def error(limit, row=row, share=share):
                return ((share @ (naively_rounded(np.clip(row, -limit, limit), 3) - row)) ** 2).sum()

            tried = [error(largest * (1 - i / 20)) for i in range(10)]
            assert error(limits[o, g]) <= min(tried) * (1 + 1e-3)
            picked.add(round(20 * (1 - limits[o, g] / largest)))
    assert picked <= set(range(10)) and len(picked) > 3


def test_clip_by_hand():
    """Two groups of two inputs with limits 1 and 2."""
    weight, limit = torch.tensor([[3.0, -0.5, -3.0, 1.5]]), torch.tensor([[1.0, 2.0]])
    assert clip(weight, limit).tolist() == [[1.0, -0.5, -2.0, 1.5]]


def test_gram_by_hand():
    """Two tokens, one group of two inputs: [1, 2] and [3, 4]."""
    assert group_gram(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 2).tolist() == [[[10, 14], [14, 20]]]
