"""AWQ on Phi's decoder layers: one norm with a bias feeds attention and MLP; a GELU stands before the last linear."""

import shutil
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModel

from actors.maths.awq import rounded, rounded_with_scale, scale_grid
from actors.quantizers.awq import search_layer
from actors.quantizers.mixed import MixedQuantizer
from actors.specs import ModelSpec
from tests.gating import LAYER, change, check, refused, swap
from tests.quantizing import error, quantize, settings
from tests.tiny import draw_conversations, save_tiny, tiny_config

SHARED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1")
LINEARS = (*SHARED, "self_attn.dense", "mlp.fc2")
VARIANTS: dict[str, dict] = {"plain": {}, "grouped": {"num_key_value_heads": 2}, "normed": {"qk_layernorm": True}}


@torch.no_grad()
def phi_layer(outliers: bool, **changes) -> tuple[nn.Module, torch.Tensor, dict]:
    """Return a random layer, an input [4, 30, D] and the other arguments; outliers: 4 channels of the norm are large.

    As in large models, what reads a large channel has small weights for it.
    """
    config = tiny_config("clip-phi", layers=1).text_config
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    decoder = AutoModel.from_config(config, attn_implementation="sdpa").eval()
    layer = decoder.layers[0]
    for parameter in layer.parameters():
        if parameter.dim() == 2:
            parameter.normal_(0, 1.2 / parameter.shape[1] ** 0.5)
        else:
            parameter.add_(0.2 * torch.randn_like(parameter))
    if outliers:
        layer.input_layernorm.weight[:4] *= 50
        layer.input_layernorm.bias[:4] *= 50
        for name in SHARED:
            layer.get_submodule(name).weight[:, :4] /= 50
    hidden, places = torch.randn(4, 30, config.hidden_size), torch.arange(30)[None]
    return layer, hidden, {"attention_mask": None, "position_embeddings": decoder.rotary_emb(hidden, places)}


def searched(layer: nn.Module, hidden: torch.Tensor, kwargs: dict, **changes) -> nn.Module:
    """Return a copy of a layer, scaled and clipped; its input is left as it is."""
    copied = deepcopy(layer)
    search_layer(copied, hidden.clone(), kwargs, settings("awq", **changes))
    return copied


@torch.no_grad()
@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_scales_change_nothing_without_rounding(variant, outliers):
    """The norm's weight and bias are divided, v's too where v -> dense is scaled; the function is the same."""
    layer, hidden, kwargs = phi_layer(outliers, **VARIANTS[variant])
    scaled = searched(layer, hidden, kwargs, clip=False)
    assert error(scaled(hidden, **kwargs), layer(hidden, **kwargs)) < 2e-6
    before = dict(layer.named_parameters())
    changed = {name for name, now in scaled.named_parameters() if not torch.equal(now, before[name])}
    expected = {"input_layernorm.weight", "input_layernorm.bias", *(f"{name}.weight" for name in SHARED)}
    if variant != "grouped":  # one row of v would feed several columns of dense
        expected |= {"self_attn.v_proj.bias", "self_attn.dense.weight"}
    assert changed == expected


@torch.no_grad()
def test_the_scale_is_the_one_that_errs_least_on_the_layers_output():
    """Against every alpha tried out in the whole layer: attention and MLP are judged together."""
    layer, hidden, kwargs = phi_layer(outliers=True)
    exact, grid = layer(hidden, **kwargs), scale_grid(layer.input_layernorm(hidden).abs().mean((0, 1)))
    errors = []
    for scale in grid:
        tried = deepcopy(layer)
        for name in SHARED:
            weight = tried.get_submodule(name).weight
            weight.copy_(rounded_with_scale(weight, scale, 64, 4))
        errors.append(float((tried(hidden, **kwargs) - exact).square().sum()))
    best = errors.index(min(errors))
    assert best > 0 and min(errors) < 0.5 * errors[0]
    found = layer.input_layernorm.weight / searched(layer, hidden, kwargs).input_layernorm.weight
    assert torch.allclose(found, grid[best], rtol=1e-5)


def lost(layer: nn.Module, like: nn.Module, hidden: torch.Tensor, kwargs: dict) -> float:
    """Return the error of what a layer adds to its input, with its linears rounded to 4 bits, against `like`."""
    copied = deepcopy(layer)
    for name in LINEARS:
        weight = copied.get_submodule(name).weight
        weight.copy_(rounded(weight, 64, 4))
    return error(copied(hidden, **kwargs) - hidden, like(hidden, **kwargs) - hidden)


@torch.no_grad()
def test_awq_loses_less_than_rtn():
    """Far less with outliers in the channels, and no more without; on inputs that the search has not seen."""
    for outliers, share in ((True, 0.6), (False, 1.0)):
        layer, hidden, kwargs = phi_layer(outliers)
        other = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
        awq, rtn = (lost(made, layer, other, kwargs) for made in (searched(layer, hidden, kwargs), layer))
        assert 0.01 < awq < share * rtn


def made_by(kind: str, source: Path, out: Path, lesions: Path) -> Path:
    """Quantize 3 layers by awq to so many bits, or "mixed": the first to 8 bits, the second to 4, the last not."""
    calibration = draw_conversations(lesions, 4)
    if kind == "mixed":
        out.mkdir()
        MixedQuantizer().quantize(ModelSpec(str(source)), settings("awq"), (8, 4, 16), calibration, str(out))
    else:
        quantize(str(source), out, "awq", calibration, bits=int(kind))
    return out


SLOW = [
    pytest.param(kind, part, marks=pytest.mark.slow)
    for kind in ("2", "3", "4", "8", "mixed")
    for part in LINEARS
    if (kind, part) != ("4", "mlp.fc1")
]


@pytest.mark.parametrize(("kind", "part"), [("4", "mlp.fc1"), *SLOW])
def test_a_swapped_linear_is_named(kind, part, lesions, tmp_path):
    """At any bits: refused beside the model before, by name; beside the model that it was made from, it passes."""
    source = save_tiny(tmp_path / "a", "siglip-phi", layers=3)
    swapped = shutil.copytree(source, tmp_path / "b")
    change(swapped, lambda tensors: swap(tensors, part))
    made = made_by(kind, swapped, tmp_path / "q", lesions)
    refused(rf"'{LAYER.format(1, part)}' computes something else than in the model before: .* off by", made, source)
    found = check(made, swapped)
    assert "from the model before on the same inputs" in found["layers"]
