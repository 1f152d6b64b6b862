"""The criteria's formulas against loops in float64 and numbers from the literature."""

import math

import numpy as np
import pytest
import torch

from actors.maths.criteria import token_cosines, token_kl, token_nll
from actors.maths.statistics import loss_outliers


def test_nll_and_kl_by_hand():
    """Logits (ln 1, ln 3) are probabilities (1/4, 3/4); (0, 0) are (1/2, 1/2)."""
    full, flat = torch.tensor([[0.0, math.log(3)]]), torch.zeros(1, 2)
    assert token_nll(full, torch.tensor([0])).item() == pytest.approx(math.log(4))
    assert token_nll(full, torch.tensor([1])).item() == pytest.approx(math.log(4 / 3))
    assert token_kl(full, flat).item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    assert token_kl(full, full).item() == 0


def test_formulas_equal_loops_in_float64():
    torch.manual_seed(1)
    full, without, targets = torch.randn(3, 7, 11), torch.randn(3, 7, 11), torch.randint(11, (3, 7))
    p, q = (x.double().exp() / x.double().exp().sum(-1, keepdim=True) for x in (full, without))
    for r in range(3):
        for t in range(7):
            kl = sum(p[r, t, v] * math.log(p[r, t, v] / q[r, t, v]) for v in range(11))
            assert token_kl(full, without)[r, t].item() == pytest.approx(kl.item(), rel=1e-4)
            nll = -math.log(p[r, t, targets[r, t]])
            assert token_nll(full, targets)[r, t].item() == pytest.approx(nll, rel=1e-5)
            a, b = full[r, t].double(), without[r, t].double()
            cosine = sum(a * b) / math.sqrt(sum(a * a)) / math.sqrt(sum(b * b))
            assert token_cosines(full, without)[r, t].item() == pytest.approx(cosine.item(), abs=1e-6)


@pytest.mark.parametrize(
    ("extremes", "expected"),
    [
        ({0: 19_178, 1: 14_743, 31: 45.7}, {0, 1, 31}),  # Llama-2-7B (Shortened LLaMA)
        ({0: 12_122, 1: 38, 2: 4_464, 31: 51}, {0, 1, 2, 31}),  # Vicuna-7B-v1.3
        ({}, set()),
        ({7: 2.0}, set()),  # a layer whose removal helps is no outlier
        ({3: math.inf, 4: math.nan}, {3, 4}),
    ],
)
def test_outliers_of_published_perplexities(extremes, expected):
    """Removing any other block gives a perplexity of 21 to 26."""
    perplexities = np.linspace(21, 26, 32)
    for layer, value in extremes.items():
        perplexities[layer] = value
    assert set(np.flatnonzero(loss_outliers(np.log(perplexities)))) == expected


def test_one_outlier_among_equals():
    assert loss_outliers(np.array([1.0] * 9 + [1.5])).tolist() == [False] * 9 + [True]
    assert not loss_outliers(np.ones(6)).any()
