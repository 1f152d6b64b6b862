"""`make demo` and the rebuild of the embedded model, in full."""

import json
import shutil
import subprocess
import sys
import time

import pytest

from tests.jobs.commands import ROOT


@pytest.mark.parametrize("job", ["demo", "make_derm_smol", "make_derm_tiny"])
def test_help_runs_nothing(job):
    done = subprocess.run([sys.executable, "-m", f"jobs.{job}", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith(f"usage: python -m jobs.{job}") and "--quiet" in done.stdout


@pytest.mark.slow
def test_demo_twice(tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", "*.egg-info"))
    first = subprocess.run([sys.executable, "-m", "jobs.demo"], cwd=copy, capture_output=True, text=True, timeout=1500)
    assert first.returncode == 0, first.stdout + first.stderr
    assert first.stderr.count("ray job submit") >= 4 and f"{copy}/runs/derm-tiny/report.html" in first.stdout
    rows = {row["method"]: row for row in json.loads((copy / "runs/derm-tiny/summary.json").read_text())}
    # Removing half the layers costs something, recovery brings most of it back.
    lost = rows["original"]["exact_pct"] - rows["prune"]["exact_pct"]
    assert lost > 20 and rows["prune+sft"]["exact_pct"] > rows["prune"]["exact_pct"] + lost / 2
    started = time.monotonic()
    second = subprocess.run([sys.executable, "-m", "jobs.demo"], cwd=copy, capture_output=True, text=True, timeout=60)
    assert second.returncode == 0 and "nothing to compute" in second.stderr
    assert time.monotonic() - started < 30


@pytest.mark.slow
def test_rebuild_derm_tiny(tmp_path):
    """A third of the steps: it learns what most lesions are called. The committed model shows what all of them give."""
    steps = ("--tower-steps", "350", "--steps", "500")
    command = [sys.executable, "-m", "jobs.make_derm_tiny", "--out", str(tmp_path), *steps]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert result.returncode == 0, result.stderr
    shares = dict(part.rsplit(" ", 1) for part in result.stdout.rsplit("exact answers ", 1)[1].strip().split(", "))
    assert float(shares["name"].rstrip("%")) >= 80
    assert float(shares["about"].rstrip("%")) >= 80
    assert (tmp_path / "model.safetensors").stat().st_size <= 8 * 2**20
    assert "not a medical model" in (tmp_path / "README.md").read_text()
