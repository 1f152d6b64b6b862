"""Quantized checkpoints: they reload, round the decoder's linears alone, and lose what they should lose."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AwqConfig

from actors.checkpoint.loading import load_model, load_processor
from actors.checkpoint.tensors import iterate_tensors, published_name, stored_bytes, stored_dtype
from actors.engine.replica import LlavaReplica
from actors.quantizers.bnb import int8_config
from actors.quantizers.table import bits_of
from actors.specs import ModelSpec
from actors.training.parts import language_linears
from actors.training.trainer import nf4_config
from tests.quantizing import PACKED, check_modules, error, image_logits, model_logits, quantize
from tests.tiny import ARCHITECTURES, LAYERS, draw_conversations, draw_samples, rename_tensors, save_tiny

LINEARS = {"clip-phi": 6, "siglip-phi": 6}  # q, k, v, dense, fc1, fc2; elsewhere q, k, v, o, gate, up, down
ERRORS = {8: (0.01, 0.1)}  # relative error of the logits of tiny random models, by bits
BYTES = {8: 0.8}  # of the float32 source's, which the rest's 16 bits halve
CPU_AWQ = AwqConfig(bits=4, group_size=64, zero_point=True, backend="torch_awq")


def quantized_pairs() -> list:
    """Every architecture by every method; two architectures by default, the rest are slow."""
    default = ("clip-qwen2-mixed", "clip-phi")
    return [
        pytest.param(name, method, marks=[] if name in default else [pytest.mark.slow])
        for name in ARCHITECTURES
        for method in PACKED
    ]


@pytest.mark.parametrize(("name", "method"), quantized_pairs())
def test_quantized_checkpoint_reloads(name, method, lesions, tmp_path):
    """Types of all modules, fewer bytes, an error that is neither zero nor large, and answers."""
    source, out = save_tiny(tmp_path / "a", name), str(tmp_path / "b")
    facts = quantize(source, tmp_path / "b", method, draw_conversations(lesions, 6))
    assert facts["linears"] == LAYERS * LINEARS.get(name, 7) and not facts["simulated"]
    assert facts["nominal_bytes"] == stored_bytes(out)
    check_modules(out, source, method)
    check_rest(source, out)
    low, high = ERRORS.get(bits_of(method, 4), (0.05, 0.6))
    assert low < error(image_logits(out, lesions), image_logits(source, lesions)) < high
    assert stored_bytes(out) < BYTES.get(bits_of(method, 4), 0.6) * stored_bytes(source)
    rows = LlavaReplica(ModelSpec(out)).answers(draw_samples(lesions, 1), [(), (1,)], 4)
    assert len(rows) == 6 and all(row["tokens"] > 0 or row["stopped"] for row in rows)


def check_rest(source: str, out: str) -> None:
    """Tower, projector, head, embeddings and final norm are the source's in float16, bit for bit."""
    before = {published_name(n): t for n, t in iterate_tensors(Path(source))}
    before = {n: t for n, t in before.items() if ".model.layers." not in n}
    after = {n: t for n, t in iterate_tensors(Path(out)) if ".model.layers." not in n}
    assert before.keys() == after.keys() and len(before) > 40
    assert all(after[n].dtype == torch.float16 and torch.equal(after[n], t.half()) for n, t in before.items())


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_bitsandbytes_reloads_exactly(method, lesions, tmp_path):
    """The stored checkpoint's logits are, bit for bit, those of the model that bitsandbytes rounded in memory."""
    source = save_tiny(tmp_path / "a", "clip-llama", dtype=torch.float16)
    quantize(source, tmp_path / "b", method)
    given = nf4_config(torch.float16) if method == "nf4" else int8_config()
    processor = load_processor(source)
    rounded = model_logits(load_model(source, "float16", quantization=given), processor, lesions)
    reloaded = model_logits(load_model(str(tmp_path / "b"), "float16"), processor, lesions)
    assert torch.equal(rounded, reloaded)
    assert error(reloaded, image_logits(source, lesions)) > 0.01


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_simulated_weights(bits, lesions, tmp_path):
    """No packed layout: 16-bit weights of 2^bits levels per group, marked, with the bits that they stand for."""
    source, out = save_tiny(tmp_path / "a", "clip-llama", layers=2), str(tmp_path / "b")
    facts = quantize(source, tmp_path / "b", "rtn", bits=bits)
    assert facts["simulated"] and facts["bits_per_weight"] == bits + 16 / 64 + bits / 64
    config = AutoConfig.from_pretrained(out)
    assert config.simulated_quantization == {"method": "rtn", "bits": bits, "group_size": 64}
    assert getattr(config, "quantization_config", None) is None
    tensors = dict(iterate_tensors(Path(out)))
    rounded = {n: t for n, t in tensors.items() if "layers" in n and "_proj.weight" in n and "language_model" in n}
    assert len(rounded) == 14 and {t.dtype for t in tensors.values()} == {torch.float16}
    levels = {len(set(row)) for t in rounded.values() for row in t.reshape(-1, 64).tolist()}
    assert max(levels) <= 2**bits and (bits == 8 or max(levels) > 2 ** (bits - 1))
    others = sum(2 * t.numel() for n, t in tensors.items() if n not in rounded)
    assert facts["nominal_bytes"] == others + facts["rounded_weights"] * facts["bits_per_weight"] / 8
    assert facts["nominal_bytes"] < stored_bytes(out)
    assert {type(load_model(out).get_submodule(n)).__name__ for n in language_linears(load_model(source))} == {"Linear"}
    low, high = {2: (0.4, 2), 3: (0.2, 1), 8: (0.002, 0.05)}[bits]
    assert low < error(image_logits(out, lesions), image_logits(source, lesions)) < high
    with pytest.raises(ValueError, match="is quantized already"):
        quantize(out, tmp_path / "c", "rtn")


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
        quantize(source, out, "rtn", group_size=group)
        lost.append(error(image_logits(str(out), lesions), exact))
        sizes.append(stored_bytes(str(out)))
    assert lost[0] < 0.9 * lost[1] and sizes[0] > sizes[1]


@pytest.mark.parametrize("style", ["published", "five"])
@pytest.mark.parametrize("method", [*PACKED, "autoawq"])
def test_names_are_the_published_ones(method, style, lesions, tmp_path):
    """Whatever the source's style, tensors get the names of llava-hf; a rounded one adds its parts next to it."""
    if method in ("autoawq", "hqq"):
        pytest.importorskip(method.removeprefix("auto"))
    source = save_tiny(tmp_path / "a", "clip-llama", layers=2)
    rename_tensors(tmp_path / "a", style)
    changes = {"awq_search": "autoawq"} if method == "autoawq" else {}
    quantize(source, tmp_path / "b", method.removeprefix("auto"), draw_conversations(lesions, 2), **changes)
    before, after = ([name for name, _ in iterate_tensors(tmp_path / folder)] for folder in "ab")
    before = [published_name(name) for name in before]
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
