"""The gate and the model before: it is streamed layer by layer, and what a rounded layer gets wrong is named."""

import gc
import json
import shutil
from pathlib import Path

import pytest
import torch

from actors import memory
from actors.checkpoint.loading import load_processor
from actors.checkpoint.pruning import prune_checkpoint
from actors.gate.parent import Parent
from actors.probe import probe_logits
from actors.quantizers.mixed import MixedQuantizer
from actors.specs import ModelSpec
from tests.gating import LAYER, UP, change, change_config, check, refused, swap
from tests.quantizing import quantize, settings
from tests.tiny import ARCHITECTURES, DERM_TINY, LAYERS, WIDTH, draw_conversations, plain_model, save_tiny


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_streamed_logits_are_the_whole_models(name, tmp_path):
    """Of plain transformers, in float32, for the model and without some of its layers."""
    source = save_tiny(tmp_path / "a", name)
    prune_checkpoint(source, str(tmp_path / "b"), [1, 3])
    processor = load_processor(source)
    for folder, removed in (("a", ()), ("b", (1, 3))):
        parent = Parent(ModelSpec(source), removed)
        numbers = [number for number, *_ in parent.layers()]
        assert numbers == list(range(LAYERS - len(removed)))
        expected = probe_logits(plain_model(str(tmp_path / folder)), processor)
        assert parent.logits() == pytest.approx(expected, rel=1e-5, abs=1e-5)


def weights(shape: tuple[int, int]) -> int:
    """The tensors of a shape that are in memory, those that are mapped from files included."""
    held = [each for each in gc.get_objects() if isinstance(each, torch.Tensor) and each.device.type != "meta"]
    return sum(tuple(each.shape) == shape for each in held)


def test_one_layer_of_the_model_before_is_in_memory(tmp_path):
    """gate_proj and up_proj of one layer while it is its turn, and nothing of it afterwards."""
    gc.collect()
    parent, shape = Parent(ModelSpec(save_tiny(tmp_path, "clip-llama"))), (2 * WIDTH, WIDTH)
    before, seen = weights(shape), []
    for _ in parent.layers():
        seen.append(weights(shape) - before)
    assert seen == [2] * LAYERS and weights(shape) == before


def test_the_model_before_need_not_fit(tmp_path, monkeypatch):
    """Neither for a pruned nor for a rounded checkpoint is it loaded as a whole, which asks for free memory."""
    source = save_tiny(tmp_path / "a", "clip-llama")
    prune_checkpoint(source, str(tmp_path / "b"), [1])
    quantize(source, tmp_path / "c", "nf4")
    quantize(source, tmp_path / "d", "rtn")
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0)
    check(tmp_path / "b", source, [1])
    for folder in ("c", "d"):
        assert "before rounding" in check(tmp_path / folder, source)["logits"]


@pytest.fixture(scope="module")
def swapped(tmp_path_factory):
    """derm-tiny with up_proj of layers 1 and 2 swapped."""
    folder = shutil.copytree(DERM_TINY, tmp_path_factory.mktemp("swapped") / "model")
    change(folder, swap)
    return folder


def rounded(source: Path, out: Path, kind: str, lesions: Path) -> Path:
    """Quantize by "rtn-4", "awq-3", ..., or "mixed": layer 1 by 4 bits, layer 2 not at all, the others by 8 bits."""
    calibration = draw_conversations(lesions, 4)
    if kind.startswith("mixed"):
        out.mkdir()
        bits = (8, 4, 16, *[8] * 7)
        MixedQuantizer().quantize(ModelSpec(str(source)), settings(kind[6:]), bits, calibration, str(out))
    else:
        quantize(str(source), out, kind[:3], calibration, bits=int(kind[4:]))
    return out


KINDS = ["awq-4", "mixed-awq"]
SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("rtn-4", "awq-3", "rtn-3", "awq-2", "mixed-rtn")]


@pytest.mark.parametrize("kind", [*KINDS, *SLOW])
def test_a_swapped_linear_is_named(kind, swapped, lesions, tmp_path):
    """Rounded from other weights than the model before has: the first is named, whatever the method and the bits."""
    refused(f"'{UP}'", rounded(swapped, tmp_path / "q", kind, lesions), DERM_TINY)
    check(tmp_path / "q", swapped)


@pytest.mark.parametrize("kind", ["awq-4", "awq-2"])
@pytest.mark.parametrize("part", ["self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj"])
@pytest.mark.slow
def test_every_swapped_linear_of_awq_is_named(part, kind, lesions, tmp_path):
    change(shutil.copytree(DERM_TINY, tmp_path / "a"), lambda tensors: swap(tensors, part))
    words = rf"'{LAYER.format(1, part)}' computes something else than in the model before: .* off by"
    refused(words, rounded(tmp_path / "a", tmp_path / "q", kind, lesions), DERM_TINY)


def test_a_layer_of_random_numbers(lesions, tmp_path):
    """Simulated AWQ at 3 bits, whose logits may be anything."""
    rounded(DERM_TINY, tmp_path, "awq-3", lesions)

    def spoil(tensors):
        for name, tensor in tensors.items():
            if ".layers.3." in name and "proj.weight" in name and "language" in name:
                tensor.copy_(tensor.std() * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)))

    change(tmp_path, spoil)
    refused(r"'language_model\.model\.layers\.3\.self_attn\.q_proj' computes something else", tmp_path, DERM_TINY)


def test_plainly_rounded_layers_pass_whatever_outliers_do(lesions, tmp_path):
    """derm-tiny's outliers put rtn's outputs further off than AWQ's may be; the weights tell that they are right."""
    found = check(rounded(DERM_TINY, tmp_path, "rtn-4", lesions), DERM_TINY)
    assert found["layers"] == "10 of 10 layers are the model before's, rounded to nearest"


def test_other_settings_than_the_model_before_had(tmp_path):
    """The tensors are right, config.json is not: the first layer that computes something else is named."""
    source = save_tiny(tmp_path / "a", "clip-llama")
    prune_checkpoint(source, str(tmp_path / "b"), [1])
    change_config(tmp_path / "b", rope_parameters={"rope_type": "default", "rope_theta": 100.0})
    refused(
        r"'language_model\.model\.layers\.0\.self_attn\.o_proj' computes something else", tmp_path / "b", source, [1]
    )
    shutil.copyfile(tmp_path / "a" / "config.json", tmp_path / "b" / "config.json")
    change_config(tmp_path / "b", num_hidden_layers=LAYERS - 1)
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    (tmp_path / "b" / "config.json").write_text(json.dumps({**config, "vision_feature_layer": -1}))
    refused("The decoder's input differs from that in the model before by", tmp_path / "b", source, [1])


def test_logits_that_are_off_name_the_first_layer(tmp_path):
    """A rounded model whose weights are all right and whose norms divide by more is not what was made."""
    source = save_tiny(tmp_path / "a", "clip-llama")
    quantize(source, tmp_path / "q", "nf4")
    check(tmp_path / "q", source, keep_probe=True)
    change_config(tmp_path / "q", rms_norm_eps=10.0)
    words = (
        r"differ from what it gave when it was made by .* first linear whose output is off: '\S+layers\.0\.self_attn"
    )
    refused(words, tmp_path / "q", source)


def test_rounded_layers_with_other_settings(tmp_path):
    """rtn's layers must compute what the rounded weights give, not only hold them."""
    source = save_tiny(tmp_path / "a", "clip-llama")
    quantize(source, tmp_path / "q", "rtn")
    change_config(tmp_path / "q", rms_norm_eps=10.0)
    refused(r"'\S+layers\.0\.self_attn\.q_proj' computes something else", tmp_path / "q", source)


@pytest.mark.parametrize("method", ["nf4", "rtn"])
@pytest.mark.parametrize("name", ["multi_modal_projector.linear_2.bias", "language_model.model.norm.weight"])
def test_what_is_not_rounded_is_the_model_befores(name, method, tmp_path):
    """A bias or a norm that is a little off: a rounded model's logits would not tell."""
    source = save_tiny(tmp_path / "a", "clip-llama")
    quantize(source, tmp_path / "q", method)

    def spoil(tensors):
        tensors[name].mul_(1.01)

    change(tmp_path / "q", spoil)
    refused(rf"'{name}' is not '{name}' of the model before: it was changed", tmp_path / "q", source)
