"""The GPU benchmark of quantized checkpoints on a tiny shape: right rows, and a reason for each that is missing."""

import json
import subprocess
import sys
from unittest.mock import Mock

import pytest
from transformers import AutoProcessor

import actors.decoding
from actors.probe import probe_inputs
from tests.benchmarks import gpu_quantized
from tests.benchmarks.gpu_quantized import TASKS, _tried, in_process, parser, run, table

QUICK = "--tiny --kernels auto --runs 2 --warmup 0 --tokens 3 --calibration 4"


def here(task: str, limit: float, **given) -> dict:
    """Run a task in the test's own process, with what crosses a process."""
    return json.loads(json.dumps(_tried(TASKS[task], **given)))


def test_rows_of_every_method_on_a_tiny_shape(monkeypatch, capsys, tmp_path):
    """Nine of twelve layers less; the rounded logits are near those of 16 bits."""
    monkeypatch.setattr(gpu_quantized, "in_process", here)
    monkeypatch.setattr(actors.decoding.torch, "compile", lambda step, fullgraph: step)
    found = run(parser().parse_args([*QUICK.split(), "--removed", "9", "--folder", str(tmp_path)]))
    rows = {row["method"]: row for row in found["variants"]}
    assert list(rows) == ["none", "rtn", "awq", "nf4"] and list(tmp_path.iterdir()) == []
    assert [row["linear"] for row in rows.values()] == ["Linear", "AwqTorchLinear", "AwqTorchLinear", "Linear4bit"]
    assert [row["paper_gb"] for row in rows.values()] == [9.7, 3.7, 3.7, 3.7]
    assert rows["none"]["logit_error"] == 0 and all(0 < rows[m]["logit_error"] < 1 for m in ("rtn", "awq", "nf4"))
    for method, row in rows.items():
        assert "not_run" not in row and row["layers"] == 3 and (method == "none" or row["quantize_s"] > 0)
        for decode in ("plain", "static"):
            assert (row[decode]["timed_runs"], row[decode]["rounds"]) == (2, 1) and row[decode]["ms_per_token"] > 0
            assert row[decode]["steady_peak_bytes"]["resident"] > 0 < row["load_peak_bytes"]["resident"]
    assert rows["awq"]["calibration_tokens"] > 0 and rows["rtn"]["weight_bytes"] < rows["none"]["weight_bytes"]
    shown = capsys.readouterr().out
    assert "paper GB" in shown and "not run" not in shown and "rtn auto, 9 removed" in shown
    json.dumps(found)


def test_the_real_shape_has_prompts_of_576_image_tokens(monkeypatch, tmp_path):
    """The config and the processor of LLaVA-1.5-7B without seven layers belong together; no weights are made."""
    configs = []
    monkeypatch.setattr(gpu_quantized, "real_model", lambda config: configs.append(config) or Mock())
    gpu_quantized.write(str(tmp_path), 7, tiny=False)
    (config,) = configs
    config.save_pretrained(tmp_path)
    made = probe_inputs(AutoProcessor.from_pretrained(tmp_path))
    assert made["pixel_values"].shape == (1, 3, 336, 336)
    assert int((made["input_ids"] == config.image_token_id).sum()) == 576 == config.image_seq_length
    assert int(made["input_ids"].max()) < config.text_config.vocab_size and config.text_config.num_hidden_layers == 25


def test_what_cannot_be_run_is_listed_with_its_reason(monkeypatch, tmp_path):
    """bitsandbytes is missing; one kernel of rtn is; plain decoding of the other runs, static does not."""
    sizes = {"resident": 2**30}
    measured = {
        **{"params": 10**9, "layers": 3, "weight_bytes": 2**30, "baseline_bytes": sizes, "load_peak_bytes": sizes},
        **{"steady_peak_bytes": sizes, "peak_restarted": True, "peak_memory_bytes": 2**30, "device": "GPU"},
        **{"threads": 1, "torch": "2", "transformers": "5"},
        "runs": [dict.fromkeys(("ms_per_token", *gpu_quantized.TIMES), 2.0)],
    }
    asked = []

    def faked(task: str, limit: float, **given) -> dict:
        asked.append((task, given.get("method") or given.get("kernel")))
        if task == "measure" and given["kernel"] == "marlin":
            return {"not_run": "ValueError: no marlin here"}
        if task == "measure":
            static = {"not_run": "ValueError: not captured"}
            return {"linear": "Linear", "logit_error": 0.0, "plain": measured, "static": static}
        return {"not_run": "ImportError: no bitsandbytes"} if given.get("method") == "nf4" else {}

    monkeypatch.setattr(gpu_quantized, "in_process", faked)
    options = ["--removed", "5", "--methods", "rtn", "nf4", "--kernels", "marlin", "gemm", "--rounds", "2"]
    found = run(parser().parse_args([*options, "--folder", str(tmp_path)]))
    assert asked == [
        *[("write", None), ("quantize", "rtn"), ("quantize", "nf4")],
        *[("measure", "marlin"), ("measure", "gemm"), ("measure", "gemm")],
    ]
    assert found["device"] == "GPU" and [row["kernel"] for row in found["variants"]] == ["marlin", "gemm", None]
    assert table(found["variants"]).splitlines()[-3:] == [
        "rtn marlin, 5 removed: not run: ValueError: no marlin here",
        "rtn gemm, 5 removed, static: not run: ValueError: not captured",
        "nf4, 5 removed: not run: ImportError: no bitsandbytes",
    ]


@pytest.mark.parametrize("end", ["killed", "slow", "raised", "done"])
def test_every_end_of_a_process_is_told(monkeypatch, end):
    def ran(command, timeout, **_):
        if end == "slow":
            raise subprocess.TimeoutExpired(command, timeout)
        said = '{"not_run": "ValueError: no"}' if end == "raised" else '{"linear": "Linear"}'
        return subprocess.CompletedProcess(command, -9 if end == "killed" else 0, f"hello\n{said}\n", "Killed\n")

    monkeypatch.setattr(gpu_quantized.subprocess, "run", ran)
    assert (
        in_process("measure", 5, path="x")
        == {
            "killed": {"not_run": "its process ended with -9: Killed"},
            "slow": {"not_run": "stopped after 5 s"},
            "raised": {"not_run": "ValueError: no"},
            "done": {"linear": "Linear"},
        }[end]
    )


CODE = f"""
import runpy, sys
sys.argv = ["gpu_quantized", *"{QUICK} --removed 9 --methods none rtn --decode plain".split()]
runpy.run_module("tests.benchmarks.gpu_quantized", run_name="__main__")
assert "ray" not in sys.modules, "must run where it is not installed"
"""


@pytest.mark.slow
def test_the_whole_benchmark_in_processes_of_its_own():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert [(row["method"], row["plain"]["timed_runs"]) for row in found["variants"]] == [("none", 2), ("rtn", 2)]
