"""Jobs as commands of their own process."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


CONFIG = "configs/derm-tiny.yaml"


def run(job: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | environment
    command_line = [sys.executable, "-m", f"jobs.{job}", "--config", CONFIG, *arguments]
    return subprocess.run(command_line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)


def assert_says(result: subprocess.CompletedProcess, *words: str) -> None:
    assert result.returncode not in (0, -9), result.stdout
    assert "Traceback" not in result.stderr + result.stdout
    said = result.stderr.strip().splitlines()[-1]
    for word in words:
        assert word in said, said


SMALL = {
    "data.draw_per_class": "5",
    "ablate.samples": "8",
    "prune.layers": "2",
    "prune.search": "one_shot",
    "replicas.count": "1",
    "recover.epochs": "0.5",
    "quantize.calibration_samples": "8",
    "evaluate.warmup_runs": "0",
    "evaluate.timed_runs": "2",
    "evaluate.timed_tokens": "4",
}


def options(folder: Path, **changes: str) -> list[str]:
    chosen = {"run_dir": str(folder), **SMALL, **changes}
    return [part for key, value in chosen.items() for part in (f"--{key}", value)]
