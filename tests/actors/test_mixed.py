"""Checkpoints whose layers have bits of their own: what plain transformers loads is what was rounded."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from actors.checkpoint.loading import language_model, load_model, load_processor
from actors.checkpoint.pruning import prune_checkpoint
from actors.gate.check import GateError
from actors.maths.awq import rounded
from actors.maths.sizes import compressed_tensors_bytes
from actors.probe import probe_logits
from actors.quantizers.mixed import MixedQuantizer, pack_weight, read_option, unpacked
from actors.quantizers.structure import linear_shapes
from actors.specs import ModelSpec
from tests.gating import check
from tests.quantizing import settings
from tests.tiny import DERM_TINY, draw_conversations

BITS = (4, 16, 8, 3, 4, 4, 16, 8, 4, 3)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("mixed")
    MixedQuantizer().quantize(ModelSpec(str(DERM_TINY)), settings("rtn"), BITS, [], str(out))
    return out


@pytest.fixture(scope="module")
def expected():
    """The original with every decoder linear rounded to its layer's bits in float32."""
    model = load_model(str(DERM_TINY))
    for number, layer in enumerate(language_model(model).layers):
        for _, module in layer.named_modules():
            if isinstance(module, torch.nn.Linear) and BITS[number] < 16:
                module.weight.data = rounded(module.weight.data, 64, BITS[number])
    return model


def test_the_reloaded_weights_are_the_rounded_ones(mixed, expected):
    found = dict(load_model(str(mixed)).named_parameters())
    for name, parameter in expected.named_parameters():
        assert torch.equal(found[name], parameter), name
    assert len(found) == len(dict(expected.named_parameters()))


def test_plain_transformers_computes_with_them(mixed, expected):
    processor = load_processor(str(mixed))
    plain = AutoModelForImageTextToText.from_pretrained(mixed, dtype=torch.float32).eval()
    wanted = probe_logits(expected, processor)
    assert probe_logits(plain, processor) == pytest.approx(wanted, abs=1e-4)
    assert probe_logits(load_model(str(mixed)), processor) == pytest.approx(wanted, abs=1e-4)


def test_the_gate_takes_it_and_says_what_it_is(mixed):
    found = check(mixed, DERM_TINY)
    assert "14 of 3 bits, 28 of 4 bits, 14 of 8 bits, 14 of 16 bits" in found["modules"]
    assert found["linears"].startswith("0 from its stored numbers")
    assert "not with 3" in found["vllm"]


@pytest.mark.parametrize(("number", "place"), [("3", "bits_4"), ("0", "bits_8")])
def test_the_gate_refuses_other_bits_than_are_stored(mixed, tmp_path, number, place):
    """A layer that the config gives other bits than its file holds."""
    for file in mixed.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    for name, group in groups.items():
        left, right = group["targets"][0].split("layers\\.(")
        numbers, rest = right.split(")", 1)
        listed = [one for one in numbers.split("|") if one != number] + ([number] if name == place else [])
        group["targets"] = [f"{left}layers\\.({'|'.join(listed)}){rest}"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(GateError, match=f"layers.{number}."):
        check(tmp_path, DERM_TINY)


def test_bytes_are_those_of_the_file(mixed):
    held: dict[int, int] = {}
    for name, tensor in stored(mixed).items():
        if "language_model.model.layers." in name and "layernorm" not in name:
            number = int(name.split(".layers.")[1].split(".")[0])
            held[number] = held.get(number, 0) + tensor.numel() * tensor.element_size()
    shapes = linear_shapes(load_model(str(DERM_TINY)).config).values()
    for number, bits in enumerate(BITS):
        sizes = [2 * o * i if bits == 16 else compressed_tensors_bytes(bits, 64, o, i) for o, i in shapes]
        assert held[number] == sum(sizes)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_what_is_packed_comes_out(bits):
    weight = torch.randn(24, 128, generator=torch.Generator().manual_seed(bits)) + 0.5
    assert torch.equal(unpacked(pack_weight(weight, bits, 64), bits), rounded(weight, 64, bits))


def test_a_layer_is_the_same_whatever_the_others_are(lesions, tmp_path):
    """AWQ: an option measured alone is what a checkpoint of mixed bits holds."""
    prune_checkpoint(str(DERM_TINY), str(tmp_path / "three"), range(3, 10))
    spec, calibration = ModelSpec(str(tmp_path / "three")), draw_conversations(lesions, 2)
    bits = (4, 16, 8)
    for folder in ("options", "made"):
        (tmp_path / folder).mkdir()
    facts = MixedQuantizer().options(spec, settings("awq"), [4, 8], calibration, str(tmp_path / "options"))
    assert facts["layers"] == 3
    MixedQuantizer().quantize(spec, settings("awq"), bits, calibration, str(tmp_path / "made"))
    loaded = language_model(load_model(str(tmp_path / "made"))).layers
    before = language_model(load_model(spec.path)).layers
    for number in (0, 2):
        option = read_option(str(tmp_path / "options"), number, bits[number])
        assert set(option) == {name for name, _ in loaded[number].named_parameters()}
        for name, tensor in option.items():
            assert torch.equal(loaded[number].get_parameter(name), tensor.float()), name
        assert not torch.equal(loaded[number].input_layernorm.weight, before[number].input_layernorm.weight)
    for name, parameter in loaded[1].named_parameters():
        assert torch.equal(parameter, before[1].get_parameter(name)), name


def test_bits_for_every_layer_are_asked_for(tmp_path):
    with pytest.raises(ValueError, match="given for 2 layers, but the model has 10"):
        MixedQuantizer().quantize(ModelSpec(str(DERM_TINY)), settings("rtn"), (4, 4), [], str(tmp_path))
