"""The gate and wrong scales: weights that are too large or too small by less than rounding may be off are refused."""

import shutil
from dataclasses import replace

import pytest
import torch

from actors.checkpoint.loading import load_model
from actors.gate.scales import computed_weight
from actors.maths.slopes import slopes
from actors.quantizers.table import METHODS, bits_of
from tests.gating import UP, change, check, refused
from tests.quantizing import NOT_UNPACKED, SCALES, quantize
from tests.tiny import save_tiny

OFF = f"'{UP}' does not compute with the weight before rounding: its scales are off"


def test_slopes_by_hand():
    """w = (3, 4), w' = (4, 4): 28/25 = 1.12 and 32/28 = 1.143; w' = (3, 0): 9/25 and 9/9; 1.2 w; -w; zeros."""
    before = torch.tensor([[3.0, 4.0]] * 5 + [[0.0, 0.0]])
    own = torch.tensor([[3.0, 4.0], [4.0, 4.0], [3.0, 0.0], [3.6, 4.8], [-3.0, -4.0], [0.0, 0.0]])
    assert slopes(own, before).tolist() == pytest.approx([1, 1.12, 1, 1.2, -1, 1], abs=1e-4)


def test_a_large_value_hides_no_scale():
    """Among 63 values that are rounded to 0 a large one is right, or 20 % too large."""
    before = torch.ones(2, 64)
    before[:, 7] = 20
    own = torch.zeros(2, 64)
    own[:, 7] = torch.tensor([20.0, 24.0])
    low = (own * before).sum(1) / before.square().sum(1)
    assert low.tolist() == pytest.approx([400 / 463, 480 / 463])
    assert slopes(own, before).tolist() == pytest.approx([1, 480 / 463], abs=1e-4)


@pytest.fixture(scope="module", params=NOT_UNPACKED)
def rounded(request, tmp_path_factory):
    """(method, a tiny model, it rounded)."""
    folder = tmp_path_factory.mktemp(request.param)
    source = save_tiny(folder / "source", "clip-qwen2", layers=2)
    quantize(source, folder / "rounded", request.param)
    return request.param, source, folder / "rounded"


def test_the_weight_is_read_off_the_outputs(rounded):
    """It gives a linear's outputs but for its bias, which is left as it was."""
    _, _, folder = rounded
    linear = load_model(str(folder), "float16").model.language_model.layers[1].self_attn.q_proj
    bias = linear.bias.clone()
    assert bias.abs().max() > 0
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).half()
    with torch.inference_mode():
        found = linear(x).float() - bias.float()
    expected = x.float() @ computed_weight(linear, 64, torch.float16).T
    assert float((found - expected).norm() / expected.norm()) < 2e-2 and torch.equal(linear.bias, bias)


@pytest.mark.parametrize(
    ("wrong", "factor", "words"),
    [
        (slice(None), 1.2, r"Its weights are 1\.2 times as large"),
        (slice(None), 0.8, r"Its weights are 0\.8\d? times as large"),
        (slice(3, 4), 1.6, r"In 1 of \d+ blocks of \d+ weights .*: 1\.6 times in the first, of output 3"),
    ],
)
def test_scales_that_are_wrong(rounded, wrong, factor, words, tmp_path):
    """Of a whole linear, or of one block of it."""
    method, source, folder = rounded
    copy = shutil.copytree(folder, tmp_path / "copy")

    def spoil(tensors):
        tensors[f"{UP}.{SCALES[method]}"].view(-1)[wrong] *= factor

    change(copy, spoil)
    refused(rf"{OFF}\. {words}", copy, source)


def test_two_methods_that_share_a_layout(rounded, monkeypatch):
    """Packed weights do not say which of the two made them: the wider bounds hold."""
    method, source, folder = rounded
    bits = bits_of(method, 4)
    monkeypatch.setitem(METHODS, "stricter", replace(METHODS[method], slopes={bits: (0.0, 0.0)}))
    check(folder, source)
    monkeypatch.setitem(METHODS, method, METHODS["stricter"])
    refused(r"'\S+' does not compute with the weight before rounding: its scales are off", folder, source)


def test_right_scales_pass(rounded):
    _, source, folder = rounded
    assert "their slopes are at most" in check(folder, source)["linears"]
