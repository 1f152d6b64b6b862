"""The GPU benchmark's code on a tiny shape: right answers, and no more than torch and transformers needed."""

import json
import subprocess
import sys

import pytest
import torch

from tests.benchmarks.gpu_ablation import Contest
from tests.tiny import tiny_model, without

CODE = """
import runpy, sys
sys.argv = ["gpu_ablation", "--tiny", "--samples", "3", "--tokens", "6", "--per-image", "2"]
runpy.run_module("tests.benchmarks.gpu_ablation", run_name="__main__")
assert not {"ray", "bitsandbytes"} & set(sys.modules), "must run where neither is installed"
"""


@pytest.mark.slow
def test_the_whole_benchmark_on_a_tiny_shape():
    """In float32 all ways agree; with lm_head zero every draft is accepted; times are scaled to the full work."""
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[-1])
    assert (row["samples"], row["removals"], row["tokens"]) == (3, 4, 6)
    assert (row["single_answers_timed"], row["batched_removals_timed"]) == (6, 4)
    assert row["identical_fraction"] == row["identical_to_batched"] == row["identical_to_no_drafts"] == 1
    assert row["forced_rows_verified_whole"] == 1 > row["rows_verified_whole"] and row["mismatches"] == 0
    assert row["limit_ratio"] > 1 and row["forced_limit_ratio"] > 1
    assert set(row["seconds"]) == {"single", "batched", "c", "d", "forced"}
    scale = row["seconds_of_128_samples_29_layers"]["single"] / (128 * 29 / 3 / 4)
    assert scale == pytest.approx(row["seconds"]["single"], abs=0.02)


@pytest.fixture
def contest():
    return Contest(tiny_model("clip-llama", 7), samples=3, image_tokens=16, tokens=5, max_rows=64)


def test_layers_are_gone_and_come_back(contest):
    """Without layer 3 six layers answer, and otherwise; afterwards the model is what it was."""
    before = contest.plain(["000"])
    with without(contest.model, (3,)):
        assert contest.model.config.text_config.num_hidden_layers == 6
        assert contest.plain(["000"]) != before
    assert contest.plain(["000"]) == before and contest.model.config.text_config.num_hidden_layers == 7


def test_a_wrong_answer_is_no_tie(contest):
    """Another token in one of the engine's answers is found, and has a gap that float32 does not round away."""
    plain = contest.single([(2,)])
    wrong = {key: list(ids) for key, ids in plain.items()}
    wrong["001", (2,)][3] = (plain["001", (2,)][3] + 1) % 512
    (found,) = contest.ties(wrong, plain)
    assert found.place == 3 and found.gap > 1e-3 and not found.is_tie


def test_lm_head_is_restored(contest):
    """The forced run leaves the model's answers as they were."""
    weight = contest.model.lm_head.weight.detach().clone()
    assert {token for ids in contest.forced().values() for token in ids} == {0}
    assert torch.equal(contest.model.lm_head.weight, weight)
