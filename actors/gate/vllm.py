"""Checks that vLLM can load a checkpoint: by loading it where vLLM is installed, else by vLLM's documents."""

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
from actors.quantizers.mixed import NAME
from actors.quantizers.structure import linear_shapes, weight_bits
from actors.quantizers.table import COMPRESSED_TENSORS
from actors.specs import NOT_ROUNDED, GateError

TEXTS = ("llama", "mistral", "qwen2", "phi")
PACKED_BITS = (4, 8)  # of compressed-tensors with zero points
LOAD = "import sys; from vllm import LLM; LLM(model=sys.argv[1], max_model_len=1024, enforce_eager=True)"
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
    layout = layout_of(config)
    if layout and layout.vllm is None:
        return "not run; vLLM does not read this format"
    if layout is COMPRESSED_TENSORS and weight_bits(config, 16) not in PACKED_BITS:
        return f"not run; vLLM reads this format with 4 and 8 bits, not with {weight_bits(config, 16)}"
    if quant_method(config):
        check_layout(config)
    if importlib.util.find_spec("vllm") is None:
        return "not run (vLLM is not installed); the layout is the documented one"
    if pick_device() == "cpu":
        return "not run (no GPU here); the layout is the documented one"
    return _load_in_vllm(folder)


def _load_in_vllm(folder: Path) -> str:
    command, pipe = [sys.executable, "-c", LOAD, str(folder)], subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as process:
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
    return "loaded"


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
