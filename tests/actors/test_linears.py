"""Repacked linears compute what plain ones compute, and leave the model as it was."""

import pytest
import torch
from torch import nn

import actors.engine.linears
from actors.engine.linears import repacked_linears


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 96), nn.SiLU(), nn.Linear(96, 40, bias=False)).eval()


@pytest.mark.parametrize("shape", [(1, 48), (7, 48), (3, 5, 48), (300, 48)])
@torch.inference_mode()
def test_products_are_those_of_float64(model, shape):
    x = torch.randn(shape)
    exact = model.double()(x.double())
    model.float()
    with repacked_linears(model):
        assert all("forward" in vars(layer) for layer in (model[0], model[2]))
        torch.testing.assert_close(model(x).double(), exact, rtol=1e-5, atol=1e-5)
    assert not any("forward" in vars(layer) for layer in model)


@torch.inference_mode()
def test_weights_that_changed_between_two_blocks_count(model):
    x = torch.randn(4, 48)
    with repacked_linears(model):
        before = model(x)
    model[2].weight.data.zero_()
    with repacked_linears(model):
        assert before.abs().min() > 0 and model(x).abs().max() == 0


@pytest.mark.parametrize("reason", ["bfloat16", "a hook", "no memory"])
def test_what_is_not_repacked(model, monkeypatch, reason):
    hook = model[0].forward
    if reason == "bfloat16":
        model.to(torch.bfloat16)
    elif reason == "a hook":
        model[0].forward = hook
    else:
        monkeypatch.setattr(actors.engine.linears, "free_bytes", lambda device: 1000)
    with repacked_linears(model):
        assert "forward" not in vars(model[2]) or reason == "a hook"
        assert vars(model[0]).get("forward") is (hook if reason == "a hook" else None)
