"""The profile job as a user runs it; and the order in which it takes its measurements."""

import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from actors.maths.latency import merge_rounds
from jobs import profile
from jobs.core.options import load_config
from jobs.core.stage import Source
from tests.jobs.commands import ROOT, assert_says, run

CHECKPOINT = "actors/derm_tiny/checkpoint"
QUICK = ("--evaluate.warmup_runs", "1", "--evaluate.timed_runs", "4", "--evaluate.timed_tokens", "8")


def fake_round(name: str, ms: float, cap: bool = False) -> dict:
    times = ("preprocess_ms", "encode_ms", "prefill_ms", "first_token_ms", "decode_ms", "total_ms", "ms_per_token")
    return {
        **{"params": 7_063_000_000, "layers": 32, "bits": 4, "weight_bytes": 2**32, "decode": "static"},
        **{"timed_tokens": 128, "peak_restarted": True, "device": name, "threads": 1, "peak_memory_bytes": 5 * 2**30},
        **{f"{when}_bytes": {"allocated": 2**30, "driver": 2**31} for when in ("baseline", "load_peak", "steady_peak")},
        "runs": [dict.fromkeys(times, ms)],
    }


class FakeRun:
    """Counts the processes that are alive, and notes who is measured with how many runs."""

    def __init__(self, *options: tuple[str, str]):
        self.config = load_config(None, list(options))
        self.alive, self.order = 0, []
        self.workers = self

    def model_spec(self, model):
        return model

    @contextmanager
    def replicas(self, model):
        self.alive += 1
        assert self.alive == 1, "a process is measured alone"
        self.model = model
        yield self
        self.alive -= 1

    def call(self, method, sample, warmup, timed, tokens, decode):
        assert (method, sample, tokens, decode) == ("profile", "question", 128, "static")
        self.order.append((self.model.path, warmup, timed))
        return fake_round(self.model.path, float(len(self.order)))


def test_checkpoints_take_turns():
    """Three rounds of a, b, c, each in a process alone, which share the 31 measured runs of each."""
    fake = FakeRun(("evaluate.decode", "static"), ("evaluate.timed_runs", "31"))
    rows = profile.compare_models(fake, [Source(name, name) for name in "abc"], "question")
    assert fake.order == [(name, 10, 11) for name in "abcabcabc"]
    assert [row["checkpoint"] for row in rows] == ["a", "b", "c"]
    assert rows[1]["ms_per_token_rounds"] == [2.0, 5.0, 8.0] and rows[1]["ms_per_token"] == 5.0


def test_the_table_on_a_gpu():
    rows = [{"checkpoint": "/runs/quantize-1", **profile.merge_rounds([fake_round("NVIDIA H100", 8.5)])}]
    head, line, memory, protocol = profile.format_rows(rows).splitlines()
    assert head.split()[-2:] == ["allocated", "driver"] and len(head) == len(line)
    assert line.split()[:6] == ["quantize-1", "7.0630", "4", "4.00", "GiB", "8.50"]
    assert "context" in memory and "NVIDIA H100" in protocol and "static decoding" in protocol and "128" in protocol


@pytest.mark.parametrize("fits", [True, False])
def test_the_verdict_is_a_sentence(fits):
    cap = {"fits": fits, "cap_bytes": 2**30, "peak_bytes": 2**29, "baseline_bytes": 2**28, "answers": 3}
    said = profile.verdict({"checkpoint": "/m", "cap": {**cap, "stage": "loading"}})
    assert said.startswith(f"/m: {'fits' if fits else 'does not fit'} in 1.00 GiB (peak 512.0 MiB, 256.0 MiB before")
    assert ("ended while loading" in said) is not fits


def test_missing_checkpoint(tmp_path):
    options = ("--run_dir", str(tmp_path), "--profile.models", f"[{CHECKPOINT}, /no/model]")
    assert_says(run("profile", *options), "/no/model", "profile.models")


def test_a_cap_on_a_part_of_a_gpu(tmp_path):
    options = ("--run_dir", str(tmp_path), "--profile.cap_gib", "6", "--replicas.gpus", "0.5")
    assert_says(run("profile", *options), "profile.cap_gib", "replicas.gpus is 0.5")


def measured(folder: Path, *options: str) -> tuple[list[dict], str]:
    result = run("profile", "--run_dir", str(folder), *QUICK, *options)
    assert result.returncode == 0, result.stderr
    return json.loads((folder / "profile.json").read_text()), result.stdout


@pytest.mark.slow
def test_a_checkpoint_without_data(tmp_path):
    """The probe is asked; the row has all that others read of it."""
    rows, said = measured(tmp_path, "--data.classes", "[]", "--data.questions", "[]", "--profile.rounds", "1")
    (row,) = rows
    assert (tmp_path / "probe.png").is_file() and not list(tmp_path.glob("images*"))
    needed = ("naive_ms_per_token", "first_token_ms", "encode_ms", "prefill_ms", "preprocess_ms", "ms_per_token")
    assert all(row[name] > 0 and len(row[f"{name}_p5_p95"]) == 2 for name in needed)
    assert row["checkpoint"] == str(ROOT / CHECKPOINT)
    assert (row["layers"], row["bits"], row["stored_bits"]) == (10, 16, 16)
    assert (row["timed_runs"], row["rounds"], row["timed_tokens"], row["decode"]) == (4, 1, 8, "plain")
    stored = load_file(ROOT / CHECKPOINT / "model.safetensors").values()
    assert row["params"] == sum(map(np.size, stored)) and row["weight_bytes"] == 2 * row["params"]
    baseline, peak = row["baseline_bytes"]["resident"], row["steady_peak_bytes"]["resident"]
    assert 100 * 2**20 < baseline < row["load_peak_bytes"]["resident"] and baseline < peak == row["peak_memory_bytes"]
    assert row["peak_memory_kind"] == "process, resident" and row["device"] == "CPU" and row["threads"] == 1
    assert "cap" not in row and "checkpoint" in said and f"{row['ms_per_token']:.2f}" in said


@pytest.mark.slow
def test_two_checkpoints_and_caps(tmp_path):
    """The test questions are answered where the cap allows, and out of memory is a result, not a failure."""
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / CHECKPOINT, copy)
    options = ("--data.draw_per_class", "4", "--profile.models", f"[{CHECKPOINT}, {copy}]", "--profile.rounds", "1")
    rows, said = measured(tmp_path / "run", *options, "--profile.cap_gib", "4")
    assert [row["checkpoint"] for row in rows] == [str(ROOT / CHECKPOINT), str(copy)]
    assert all(row["cap"]["fits"] and row["cap"]["answers"] > 20 for row in rows)
    assert said.count("fits in 4.00 GiB") == 2
    rows, said = measured(tmp_path / "run", *options, "--profile.cap_gib", "0.1")
    assert not any(row["cap"]["fits"] for row in rows) and said.count("does not fit in 102.4 MiB") == 2


def test_rows_whose_weights_are_unpacked_are_marked():
    """A quarter of the weights, and more memory than the first: a star, and a line that says why."""
    rows = [
        {"checkpoint": path, **merge_rounds([fake_round("CPU", 5.0)])} for path in ("original", "quantized", "pruned")
    ]
    rows[1] |= {"weight_bytes": 2**30, "peak_memory_bytes": 6 * 2**30}
    rows[2] |= {"weight_bytes": 2**31, "peak_memory_bytes": 4 * 2**30}
    lines = profile.format_rows(rows).splitlines()
    assert ["*" in line for line in lines[1:4]] == [False, True, False]
    assert any(line.startswith("* smaller weights, but more memory than the first") for line in lines)
    assert "*" not in profile.format_rows([rows[0], rows[2]])
