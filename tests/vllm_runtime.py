"""vLLM in the tests: its environment, and answers of a process of its own."""

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / ".venv-vllm"
PYTHON = HOME / "bin" / "python"
needs_vllm = pytest.mark.skipif(
    not (HOME / "installed").exists(), reason="vLLM is not tried: `make vllm` makes its environment (3.5 GB)"
)


def vllm_env() -> Mapping[str, str]:
    """Return the variables under which vLLM runs here: one thread, 1 GiB of key/value cache, no downloads."""
    ours = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | ours


def vllm_answers(folder: Path, items: list[dict]) -> list[list[int] | str]:
    """Return vLLM's answer to each item of tests/vllm_cpu/answer.py, or why there is none."""
    asked, answered = folder / "asked.json", folder / "answered.json"
    asked.write_text(json.dumps(items))
    command = [str(PYTHON), str(ROOT / "tests" / "vllm_cpu" / "answer.py"), str(asked), str(answered)]
    env = {**vllm_env(), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(answered.read_text())
