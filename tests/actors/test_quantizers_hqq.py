"""HQQ: the library's own rounding, in files of ours that load_model reads and plain transformers refuses."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageTextToText

from actors.checkpoint.loading import load_model, load_processor
from actors.checkpoint.tensors import stored_dtype
from actors.maths.awq import rounded
from actors.training.parts import language_linears
from tests.quantizing import error, image_logits, model_logits, quantize
from tests.tiny import save_tiny

hqq = pytest.importorskip("hqq.core.quantize")


def by_hqq(weight: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """Round a weight with HQQLinear itself and dequantize it."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight
    given = hqq.BaseQuantizeConfig(nbits=bits, group_size=64, axis=1)
    return hqq.HQQLinear(linear, given, compute_dtype=dtype, device="cpu").dequantize()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_are_the_librarys(bits, dtype, tmp_path):
    """Every reloaded weight is, bit for bit, what HQQLinear dequantizes; the model may compute in any type."""
    source = save_tiny(tmp_path / "a", "clip-qwen2", layers=2, dtype=dtype)
    facts = quantize(source, tmp_path / "b", "hqq", bits=bits)
    assert not facts["simulated"] and facts["bits_per_weight"] == pytest.approx({3: 3.7}.get(bits, bits + 0.5), rel=0.1)
    before = load_model(source)
    for computed in ("float32", str(dtype).removeprefix("torch.")):
        after = load_model(str(tmp_path / "b"), computed)
        for name in language_linears(before):
            found, exact = after.get_submodule(name).dequantize(), before.get_submodule(name).weight.detach()
            assert torch.equal(found, by_hqq(exact, bits, dtype)) and found.dtype == dtype
            assert 0 < error(found.float(), exact) < 3 * 2.0**-bits
    assert stored_dtype(str(tmp_path / "b")) == dtype


@pytest.mark.parametrize("name", ["clip-qwen2", "siglip-llama"])
def test_reload_computes_what_was_rounded(name, lesions, tmp_path):
    """The reloaded model's logits are those of a float model with HQQLinear's weights (1e-5 relative)."""
    source = save_tiny(tmp_path / "a", name, dtype=torch.float16)
    quantize(source, tmp_path / "b", "hqq")
    model = load_model(source)
    for linear in language_linears(model):
        weight = model.get_submodule(linear).weight
        weight.data = by_hqq(weight.detach(), 4, torch.float16).float()
    found = image_logits(str(tmp_path / "b"), lesions)
    assert error(found, model_logits(model, load_processor(source), lesions)) < 1e-5
    assert error(found, image_logits(source, lesions)) > 0.05


@pytest.mark.parametrize("bits", [4, 3])
def test_normal_weights_lose_no_more_than_by_rounding_to_nearest(bits):
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(bits)) / 20
    assert 0 < error(by_hqq(weight, bits, torch.float16).float(), weight) <= error(rounded(weight, 64, bits), weight)


@pytest.mark.slow
def test_plain_transformers_refuses(tiny_path, tmp_path):
    """Not filled with random weights: an error about the shape of the packed weights."""
    quantize(tiny_path, tmp_path / "b", "hqq")
    code = "import sys; from transformers import AutoModelForImageTextToText as A; A.from_pretrained(sys.argv[1])"
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path / "b")], capture_output=True, text=True)
    assert result.returncode == 1 and "mismatch" in result.stderr
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "b")  # here load_model's quantizer is registered


def test_a_missing_part_is_an_error(tiny_path, tmp_path):
    """load_model's strict check sees the packed tensors, too."""
    quantize(tiny_path, tmp_path / "b", "hqq")
    file = Path(tmp_path / "b" / "model.safetensors")
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("up_proj.scale"))
    save_file({n: t for n, t in tensors.items() if n != name}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing keys .*up_proj\.scale"):
        load_model(str(tmp_path / "b"))


def test_without_the_library(tiny_path, tmp_path, monkeypatch):
    """Making and reading such a checkpoint both name the pip command."""
    quantize(tiny_path, tmp_path / "b", "hqq")
    monkeypatch.setitem(sys.modules, "hqq.core", None)
    for attempt in (lambda: quantize(tiny_path, tmp_path / "c", "hqq"), lambda: load_model(str(tmp_path / "b"))):
        with pytest.raises(ValueError, match=r"hqq package.*pip install hqq==0\.2\.8\.post1"):
            attempt()
