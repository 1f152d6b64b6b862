"""Repacked linears compute what plain ones compute, and leave the model as it was."""

import pytest
import torch
from torch import nn

import actors.engine.linears
from actors.checkpoint.loading import load_model
from actors.engine.linears import PACKED, repacked_linears, unpack_weight
from actors.engine.replica import LlavaReplica
from actors.specs import ModelSpec
from tests.quantizing import quantize
from tests.tiny import DERM_TINY, draw_samples, plain_answer, plain_model, save_tiny, without


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


@pytest.mark.parametrize("kind", ["clip-llama", "clip-phi"])  # without biases, and with them
@torch.inference_mode()
def test_packed_linears_multiply_by_the_kernels_own_weights(kind, tmp_path):
    """Against float64; the kernel, which multiplies in float16, is off by its rounding. It is back after the block."""
    source = save_tiny(tmp_path / "a", kind, 2)
    quantize(source, tmp_path / "b", "rtn", group_size=32)
    model = load_model(str(tmp_path / "b"))
    packed = [module for module in model.modules() if type(module).__name__ == PACKED]
    assert len(packed) == 2 * (7 if kind == "clip-llama" else 6)
    for linear in packed:
        weight, x = unpack_weight(linear), torch.randn(3, 5, linear.in_features)
        identity = torch.eye(linear.in_features)
        bias = torch.zeros(linear.out_features) if linear.bias is None else linear.bias.float()
        if linear.bias is None:
            assert torch.equal(linear(identity).T, weight)
        exact = x.double() @ weight.double().T + bias.double()
        plain = linear(x)
        with repacked_linears(model):
            torch.testing.assert_close(linear(x).double(), exact, rtol=1e-5, atol=1e-5)
        assert torch.equal(linear(x), plain) and "forward" not in vars(linear)
        torch.testing.assert_close(plain.double(), exact, rtol=1e-2, atol=1e-2)


def test_a_rounded_models_answers_are_those_of_its_weights(lesions, tmp_path):
    """The engine on a packed checkpoint says, token for token, what plain transformers says with unpacked weights."""
    quantize(str(DERM_TINY), tmp_path / "b", "rtn")
    replica = LlavaReplica(ModelSpec(str(tmp_path / "b"), gpus=0), 64)
    samples = draw_samples(lesions, 3)
    rows = replica.answers(samples, [(), (4,)], 24)
    weights = {
        name: unpack_weight(module) for name, module in replica.model.named_modules() if type(module).__name__ == PACKED
    }
    plain = plain_model(str(DERM_TINY))
    for name, weight in weights.items():
        plain.get_submodule(name).weight.data.copy_(weight)
    for row in rows:
        (sample,) = [sample for sample in samples if sample.id == row["sample_id"]]
        with without(plain, row["removed"]):
            ids = plain_answer(plain, replica.processor, sample, 24)
        assert row["token_ids"] == ids
