"""Quantized checkpoints: they reload, round the decoder's linears alone, and lose what they should lose."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AwqConfig

from actors.conversations import collate
from actors.derm_tiny.draw import write_tree
from actors.loading import load_model, load_processor
from actors.quantizers.quantizer import Quantizer
from actors.replica import LlavaReplica
from actors.specs import ModelSpec, QuantizeSettings
from actors.surgery import iterate_tensors, stored_bytes, stored_dtype
from actors.trainer import language_linears
from tests.tiny import ARCHITECTURES, DERM_TINY, LAYERS, draw_conversations, draw_samples, rename_tensors, save_tiny

SETTINGS = QuantizeSettings(method="rtn", bits=4, group_size=64, clip=True)
LINEARS = {"clip-phi": 6}  # q, k, v, dense, fc1, fc2; elsewhere q, k, v, o, gate, up, down
PACKED = {"rtn": "AwqTorchLinear", "awq": "AwqTorchLinear", "nf4": "Linear4bit"}
CPU_AWQ = AwqConfig(bits=4, group_size=64, zero_point=True, backend="torch_awq")


def quantize(path: str, out: Path, method: str, calibration=()) -> dict:
    out.mkdir(exist_ok=True)
    return Quantizer().quantize(ModelSpec(path), replace(SETTINGS, method=method), list(calibration), str(out))


def check_modules(path: str, source: str, method: str) -> None:
    """The source's decoder linears are of the method's class, its other linears are ordinary ones."""
    before, after = load_model(source), load_model(path)
    ours = set(language_linears(before))
    kinds = {name: type(module).__name__ for name, module in after.named_modules()}
    assert {kinds[name] for name in ours} == {PACKED[method]}
    plain = {name: type(module).__name__ for name, module in before.named_modules() if isinstance(module, nn.Linear)}
    others = {name: kind for name, kind in plain.items() if name not in ours}
    assert {"lm_head", "model.multi_modal_projector.linear_1"} < set(others)
    assert any(name.startswith("model.vision_tower.") for name in others)
    assert {name: kinds[name] for name in others} == others
    assert sum(kind == PACKED[method] for kind in kinds.values()) == len(ours)


def image_logits(path: str, root: Path, count: int = 6) -> torch.Tensor:
    """Logits of a checkpoint in float32 for conversations about drawn images."""
    return model_logits(load_model(path), load_processor(path), root, count)


@torch.inference_mode()
def model_logits(model, processor, root: Path, count: int = 6) -> torch.Tensor:
    batch = collate(processor, draw_conversations(root, count))
    return model(**batch).logits.float()[batch["attention_mask"].bool()]


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("method", ["rtn", "nf4"])
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "clip-qwen2-mixed"])
def test_quantized_checkpoint_reloads(name, method, lesions, tmp_path):
    """Types of all modules, fewer bytes, an error that is neither zero nor large, and answers."""
    source, out = save_tiny(tmp_path / "a", name), str(tmp_path / "b")
    assert quantize(source, tmp_path / "b", method)["linears"] == LAYERS * LINEARS.get(name, 7)
    check_modules(out, source, method)
    assert 0.05 < error(image_logits(out, lesions), image_logits(source, lesions)) < 0.6
    assert stored_bytes(out) < 0.6 * stored_bytes(source)
    rows = LlavaReplica(ModelSpec(out)).answers(draw_samples(lesions, 1), [(), (1,)], 4)
    assert len(rows) == 6 and all(row["tokens"] > 0 for row in rows)


def naively_rounded(weight: np.ndarray, group: int) -> np.ndarray:
    """Round to 16 levels between each group's smallest and largest value, in float64, one group at a time."""
    result = np.empty_like(weight, dtype=np.float64)
    for o, row in enumerate(weight.astype(np.float64)):
        for start in range(0, len(row), group):
            part = row[start : start + group]
            low, high = min(part.min(), 0.0), max(part.max(), 0.0)
            scale = float(np.float16((high - low) / 15))
            zero = np.round(-low / scale)
            result[o, start : start + group] = (np.clip(np.round(part / scale) + zero, 0, 15) - zero) * scale
    return result


@pytest.mark.parametrize("name", ["clip-llama", "clip-qwen2"])
def test_rtn_equals_a_naively_rounded_float_model(name, lesions, tmp_path):
    """What transformers computes from the packed file is the float model with every decoder weight rounded."""
    source, out = save_tiny(tmp_path / "a", name), str(tmp_path / "b")
    quantize(source, tmp_path / "b", "rtn")
    model = load_model(source).half().float()  # everything else is stored in float16
    exact = load_model(source)
    for linear in language_linears(model):
        weight = exact.get_submodule(linear).weight.detach().numpy()
        model.get_submodule(linear).weight.data = torch.from_numpy(naively_rounded(weight, 64)).float()
    processor = load_processor(source)
    expected, found = model_logits(model, processor, lesions), image_logits(out, lesions)
    assert error(found, expected) < 2e-3
    assert error(found, image_logits(source, lesions)) > 0.05


def test_more_groups_lose_less(lesions, tmp_path):
    """Groups of 16 follow the weights more closely than groups of 64, and cost more bytes."""
    source = save_tiny(tmp_path / "a", "clip-llama")
    exact = image_logits(source, lesions)
    lost, sizes = [], []
    for group in (16, 64):
        out = tmp_path / str(group)
        out.mkdir()
        Quantizer().quantize(ModelSpec(source), replace(SETTINGS, group_size=group), [], str(out))
        lost.append(error(image_logits(str(out), lesions), exact))
        sizes.append(stored_bytes(str(out)))
    assert lost[0] < 0.9 * lost[1] and sizes[0] > sizes[1]


@pytest.mark.parametrize("style", ["published", "five"])
@pytest.mark.parametrize("method", ["rtn", "nf4", "awq"])
def test_names_are_the_sources(method, style, lesions, tmp_path):
    """Every tensor keeps its name, whatever the naming style; a rounded one adds its parts next to it."""
    if method == "awq":
        pytest.importorskip("awq")
    source = save_tiny(tmp_path / "a", "clip-llama", layers=2)
    rename_tensors(tmp_path / "a", style)
    quantize(source, tmp_path / "b", method, draw_conversations(lesions, 2))
    before, after = (dict(iterate_tensors(tmp_path / folder)) for folder in "ab")
    linears = {name.removesuffix("weight") for name in before if "language_model." in name and "_proj.weight" in name}
    assert len(linears) == 14
    whole = {name for name in before if name.removesuffix("weight") not in linears}
    assert whole == {name for name in after if not name.startswith(tuple(linears))}
    assert all(any(name.startswith(stem) for name in after) for stem in linears)


def test_rtn_bytes_by_hand(tmp_path):
    """Width 64, mlp 128, 5 layers: 40,960 weights a layer at 4 + 16/64 + 4/64 = 4.3125 bits; the rest at 16 bits."""
    source, out = save_tiny(tmp_path / "a", "clip-llama"), str(tmp_path / "b")
    quantize(source, tmp_path / "b", "rtn")
    linears = 4 * 64 * 64 + 3 * 64 * 128
    assert linears == 40_960
    everything = sum(tensor.numel() for _, tensor in iterate_tensors(Path(source)))
    assert stored_bytes(out) == 5 * linears * 4.3125 / 8 + 2 * (everything - 5 * linears)


def test_config_tells_the_stored_type(tiny_path, tmp_path):
    """The source is float32, the rounded checkpoint float16: dtype="auto" must not load what is not there."""
    quantize(tiny_path, tmp_path / "b", "rtn")
    assert stored_dtype(tiny_path) == torch.float32 and stored_dtype(str(tmp_path / "b")) == torch.float16
    tensors = [tensor for _, tensor in iterate_tensors(tmp_path / "b")]
    assert {tensor.dtype for tensor in tensors} == {torch.float16, torch.int32}
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "b", dtype="auto", quantization_config=CPU_AWQ)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}


@pytest.fixture(scope="module")
def derm_rounded(tmp_path_factory, lesions):
    """derm-tiny, whose channels have planted outliers, by awq and by rtn."""
    pytest.importorskip("awq")
    root = tmp_path_factory.mktemp("rounded")
    facts = quantize(str(DERM_TINY), root / "awq", "awq", draw_conversations(lesions, 16))
    quantize(str(DERM_TINY), root / "rtn", "rtn")
    return root, facts


def test_awq_beats_rtn_on_outliers(derm_rounded, lesions):
    """On images that the calibration has not seen, awq's logit error is less than half of rtn's."""
    root, facts = derm_rounded
    assert facts["linears"] == 70 and facts["calibration_tokens"] > 100
    other = root / "other"
    if not other.exists():
        write_tree(other, per_class=1, seed=77)
    exact = image_logits(str(DERM_TINY), other, 8)
    awq, rtn = (error(image_logits(str(root / method), other, 8), exact) for method in ("awq", "rtn"))
    assert 0.005 < awq < 0.5 * rtn


def test_awq_checkpoint_reloads(derm_rounded, lesions):
    """The same modules and the same size as rtn's; its answers are nearly the float model's."""
    root, _ = derm_rounded
    check_modules(str(root / "awq"), str(DERM_TINY), "awq")
    assert stored_bytes(str(root / "awq")) == stored_bytes(str(root / "rtn"))
    assert stored_dtype(str(root / "awq")) == torch.float16
    samples = draw_samples(lesions, 8, ["What is the name of this disease?"])
    float_rows = LlavaReplica(ModelSpec(str(DERM_TINY))).answers(samples, [()], 12)
    awq_rows = LlavaReplica(ModelSpec(str(root / "awq"))).answers(samples, [()], 12)
    assert sum(a["answer"] == b["answer"] for a, b in zip(awq_rows, float_rows, strict=True)) >= 6


def test_awq_on_grouped_queries_and_windows(lesions, tmp_path):
    """Grouped-query attention has no v -> o scaling; a random Mistral with a window still gets a usable checkpoint."""
    pytest.importorskip("awq")
    source, out = save_tiny(tmp_path / "a", "clip-mistral-window", layers=2), tmp_path / "b"
    out.mkdir()
    settings = replace(SETTINGS, method="awq", clip=False)
    facts = Quantizer().quantize(ModelSpec(source), settings, draw_conversations(lesions, 6), str(out))
    assert facts["linears"] == 14
    check_modules(str(out), source, "awq")
    assert 0.02 < error(image_logits(str(out), lesions), image_logits(source, lesions)) < 0.6


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, r"k_proj of 32 outputs, which 64 does not divide: set quantize\.clip to false"),
        ({"group_size": 48}, r"q_proj of 64 inputs in groups of 48: choose a quantize\.group_size"),
    ],
)
def test_awq_sizes_that_do_not_divide(lesions, tmp_path, change, words):
    """autoawq's bare assertion becomes a message before the search starts."""
    pytest.importorskip("awq")
    source = save_tiny(tmp_path / "a", "clip-mistral-window", layers=2)
    settings = replace(SETTINGS, method="awq", **change)
    with pytest.raises(ValueError, match=words):
        Quantizer().quantize(ModelSpec(source), settings, draw_conversations(lesions, 2), str(tmp_path))


def test_awq_needs_calibration(tiny_path, tmp_path):
    """No training conversations: the message says where they come from."""
    pytest.importorskip("awq")
    with pytest.raises(ValueError, match="needs calibration conversations from the training split"):
        quantize(tiny_path, tmp_path, "awq")


def test_awq_refuses_unknown_layers(lesions, tmp_path):
    """Phi's layer has one norm and no gated MLP: the message names the methods that work."""
    pytest.importorskip("awq")
    source = save_tiny(tmp_path / "a", "clip-phi", layers=2)
    with pytest.raises(ValueError, match=r"PhiDecoderLayer.*choose --quantize\.method nf4 or rtn"):
        quantize(source, tmp_path / "b", "awq", draw_conversations(lesions, 2))


def test_awq_without_autoawq(tiny_path, lesions, tmp_path, monkeypatch):
    """The remedy is one pip command."""
    monkeypatch.setitem(sys.modules, "awq.quantize.quantizer", None)
    with pytest.raises(ValueError, match=r"pip install --no-deps autoawq==0\.2\.9"):
        quantize(tiny_path, tmp_path, "awq", draw_conversations(lesions, 2))


def test_nf4_blocks_are_64(tiny_path, tmp_path):
    """bitsandbytes' block cannot be chosen: asking for another is an error, not a silent 64."""
    with pytest.raises(ValueError, match=r"blocks of 64; quantize\.group_size is 32"):
        Quantizer().quantize(ModelSpec(tiny_path), replace(SETTINGS, method="nf4", group_size=32), [], str(tmp_path))


def test_quantizing_twice(tiny_path, tmp_path):
    """A quantized checkpoint is not rounded again."""
    quantize(tiny_path, tmp_path / "b", "rtn")
    with pytest.raises(ValueError, match="is quantized already"):
        quantize(str(tmp_path / "b"), tmp_path / "c", "rtn")


def test_unknown_method(tiny_path, tmp_path):
    """The message lists the methods."""
    with pytest.raises(ValueError, match="'int3': choose awq, nf4 or rtn"):
        quantize(tiny_path, tmp_path, "int3")
