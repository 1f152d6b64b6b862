"""What the quantizers refuse, as early as it can be known, and what they check of their own result."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from actors import memory
from actors.checkpoint.loading import load_model
from actors.checkpoint.pruning import prune_checkpoint
from actors.quantizers.mixed import MixedQuantizer
from actors.quantizers.storage import check_rounded
from actors.quantizers.structure import check_quantizable
from actors.quantizers.table import METHODS
from actors.specs import ModelSpec
from tests.gating import check
from tests.quantizing import PACKED, quantize, settings
from tests.tiny import ARCHITECTURES, DERM_TINY, draw_conversations, save_tiny, tiny_config


@pytest.mark.parametrize(
    ("method", "changes", "words"),
    [
        ("nf4", {"group_size": 32}, r"nf4 has blocks of 64; quantize\.group_size is 32"),
        ("hqq", {"group_size": 20}, r"hqq's groups are multiples of 8; quantize\.group_size is 20"),
        ("nf4", {"bits": 8}, r"nf4 has 4 bits; quantize\.bits is 8: set it to 4"),
        ("int8", {"bits": 4}, r"int8 has 8 bits; quantize\.bits is 4: set it to 8"),
        ("awq", {"bits": 5}, r"awq has 2 or 3 or 4 or 8 bits; quantize\.bits is 5"),
        ("none", {"bits": 16}, f"Unknown quantizer 'none': choose {', '.join(METHODS)}"),
    ],
)
def test_settings_that_a_method_does_not_have(method, changes, words):
    """Refused when the settings are made, without any model: not silently replaced."""
    with pytest.raises(ValueError, match=words):
        settings(method, **changes)


@pytest.mark.parametrize(
    ("name", "method", "changes", "words"),
    [
        ("clip-llama", "rtn", {"group_size": 48}, r"rtn cannot round self_attn\.q_proj of 64 inputs in groups of 48"),
        ("clip-llama", "hqq", {"group_size": 48}, r"hqq cannot round .* of 48: choose a quantize\.group_size"),
        ("clip-phi", "awq", {"awq_search": "autoawq"}, r"layers of 'phi', .*--quantize\.awq_search layerwise"),
        ("clip-qwen2", "awq", {"awq_search": "autoawq"}, r"v_proj of 32 outputs.*64 does not divide.*to layerwise"),
    ],
)
def test_refused_from_the_config_alone(name, method, changes, words):
    """No weights are needed to see what cannot work."""
    with pytest.raises(ValueError, match=words):
        check_quantizable(tiny_config(name), settings(method, **changes))


def test_decoder_layers_that_awq_does_not_know():
    """Whatever the search: methods that look at no layer's structure are named."""
    config, others = tiny_config("clip-llama"), ", ".join(name for name in METHODS if name != "awq")
    config.text_config.model_type = "gemma"
    for search in ("autoawq", "layerwise"):
        with pytest.raises(ValueError, match=rf"layers of 'gemma' .*choose --quantize\.method {others}\."):
            check_quantizable(config, settings("awq", awq_search=search))


@pytest.mark.parametrize("method", PACKED)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_not_refused(name, method):
    """What is tested above passes the same check; autoawq's without clipping, too, but for Phi."""
    check_quantizable(tiny_config(name), settings(method))
    if method == "awq" and "phi" not in name:
        check_quantizable(tiny_config(name), settings(method, awq_search="autoawq", clip=False))


@pytest.mark.parametrize("method", ["rtn", "nf4", "hqq"])
def test_quantizing_twice(method, tiny_path, tmp_path):
    """A quantized checkpoint is not rounded again, by whatever method."""
    quantize(tiny_path, tmp_path / "b", method)
    for second in PACKED:
        with pytest.raises(ValueError, match="is quantized already"):
            quantize(str(tmp_path / "b"), tmp_path / "c", second)


def test_a_text_only_model(tmp_path):
    """A language model without tower and projector is refused by its kind, whatever is asked of it."""
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=50, **text)).save_pretrained(tmp_path / "a")
    source = str(tmp_path / "a")
    attempts = (
        lambda: quantize(source, tmp_path / "b", "rtn"),
        lambda: quantize(source, tmp_path / "b", "nf4"),
        lambda: MixedQuantizer().quantize(ModelSpec(source), settings("rtn"), [4, 4], [], str(tmp_path / "b")),
        lambda: prune_checkpoint(source, str(tmp_path / "b"), [1]),
        lambda: load_model(source),
        lambda: check(source),
        lambda: check(DERM_TINY, source),
    )
    for attempt in attempts:
        with pytest.raises(ValueError, match="'llama' is not a LLaVA's: it lacks text_config or vision_config"):
            attempt()


def test_autoawq_without_room_names_the_search_that_needs_less(tiny_path, tmp_path, lesions, monkeypatch):
    pytest.importorskip("awq")
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0)
    calibration = draw_conversations(lesions, 2)
    with pytest.raises(memory.TooLittleMemory, match=r"needs .* GiB .*--quantize\.awq_search layerwise"):
        quantize(tiny_path, tmp_path / "b", "awq", calibration, awq_search="autoawq")
    quantize(tiny_path, tmp_path / "c", "awq", calibration)


def test_a_rounded_tower_is_noticed(tiny_path, tmp_path):
    """A tensor outside the decoder layers in fewer bits, or a linear left unrounded, ends the job."""
    quantize(tiny_path, tmp_path / "b", "rtn")
    config, given = AutoConfig.from_pretrained(tiny_path), settings("rtn")
    file = tmp_path / "b" / "model.safetensors"
    tensors = load_file(file)
    assert check_rounded(tmp_path / "b", config, given)["linears"] == 35
    name = next(name for name in tensors if name.startswith("vision_tower") and tensors[name].dim() == 2)
    save_file({**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, file)
    with pytest.raises(RuntimeError, match=f"rtn stored '{name}' as torch.float8_e4m3fn"):
        check_rounded(tmp_path / "b", config, given)
    save_file({n: t for n, t in tensors.items() if "layers.0.mlp.up_proj" not in n or "vision" in n}, file)
    with pytest.raises(RuntimeError, match="holds 34 decoder linears, not 5 x 7"):
        check_rounded(tmp_path / "b", config, given)


def test_too_large_for_16_bits(tmp_path):
    """A weight outside the decoder's linears that float16 cannot hold is named, not stored as infinity."""
    source = save_tiny(tmp_path / "a", "clip-llama", layers=1)
    file = tmp_path / "a" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "linear_1.weight" in name)
    tensors[name][0, 0] = 1e5
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"'{name}' has a value that torch.float16 cannot hold"):
        quantize(source, tmp_path / "b", "rtn")
