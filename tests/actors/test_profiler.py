"""The profiler: its arithmetic against a fake clock, phases and token counts on a real model, memory."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import actors.profiler
from actors import footprint
from actors.checkpoint.tensors import stored_bytes
from actors.decoding import Plain
from actors.engine.replica import LlavaReplica
from actors.maths.latency import merge_rounds, run_times, summary
from actors.memory import GIB
from actors.profiler import measure
from actors.quantizers.structure import weight_bits
from actors.specs import ModelSpec
from tests.tiny import draw_samples

MIB = 2**20


class FakeModel:
    """A tower that takes 30 ms and a projector that takes 10 ms of a fake clock."""

    def __init__(self, clock: SimpleNamespace):
        tower, projector = torch.nn.Identity(), torch.nn.Identity()
        tower.register_forward_hook(lambda *_: clock.wait(0.03))
        projector.register_forward_hook(lambda *_: clock.wait(0.01))
        self.model = SimpleNamespace(vision_tower=tower, multi_modal_projector=projector)


@pytest.fixture
def clock(monkeypatch):
    fake = SimpleNamespace(now=50.0)

    def wait(seconds):
        fake.now += seconds

    fake.wait = wait
    monkeypatch.setattr(actors.profiler, "time", SimpleNamespace(perf_counter=lambda: fake.now))
    return fake


def timed(clock, paces: list[float], warmup: int, tokens: int, returned: int | None = None) -> list[dict]:
    """Measure a fake: 5 ms of preprocessing, 100 ms to the first token, then `pace` ms each, another in each run."""
    model, left = FakeModel(clock), list(paces)

    def prepare():
        clock.wait(0.005)
        return {"input_ids": "x"}

    def decode(inputs, new_tokens, tick):
        assert inputs == {"input_ids": "x"}
        model.model.multi_modal_projector(model.model.vision_tower(torch.zeros(1)))
        pace = left.pop(0)
        for number in range(new_tokens):
            clock.wait(0.06 if number == 0 else pace / 1e3)
            tick()
        return list(range(returned or new_tokens))

    runs = measure(model, prepare, decode, warmup, len(paces) - warmup, tokens)
    assert left == []
    return runs


def test_formulas(clock):
    """Paces 10, 12, 20 ms after a slow warm-up: median 12; end to end 100 + 9 x 12 = 208 ms, 20.8 ms per token."""
    row = summary(timed(clock, [500, 10, 20, 12], warmup=1, tokens=10))
    expected = {
        **{"preprocess_ms": 5, "encode_ms": 40, "prefill_ms": 60, "first_token_ms": 100},
        **{"decode_ms": 9 * 12, "total_ms": 5 + 208, "ms_per_token": 12, "naive_ms_per_token": 20.8},
    }
    assert {name: row[name] for name in expected} == pytest.approx(expected)
    # inclusive percentiles of 10, 12, 20: 10 + 0.1 x 2 and 12 + 0.9 x 8
    assert row["ms_per_token_p5_p95"] == pytest.approx([10.2, 19.2])


def test_one_timed_run(clock):
    """A single run is its own percentile."""
    row = summary(timed(clock, [7], warmup=0, tokens=5))
    assert row["ms_per_token"] == pytest.approx(7) and row["ms_per_token_p5_p95"] == pytest.approx([7, 7])


def test_a_wrong_number_of_tokens_is_an_error(clock):
    with pytest.raises(RuntimeError, match="returned 4 tokens instead of 5"):
        timed(clock, [7], warmup=0, tokens=5, returned=4)


def test_rounds_are_merged():
    """Times over all runs of all processes, memory of the largest process, and how far the processes differ."""

    def part(memory, *paces):
        runs = [run_times(0.0, 1.0, 0.5, [2.0, 2.0 + pace / 1e3]) for pace in paces]
        peaks = {"baseline_bytes": 1, "load_peak_bytes": 9, "steady_peak_bytes": memory}
        nested = {when: {"resident": taken} for when, taken in peaks.items()}
        return {**nested, "peak_memory_bytes": memory, "bits": 4, "runs": runs}

    row = merge_rounds([part(5, 10, 12, 40), part(7, 20, 14, 16)])
    assert row["ms_per_token"] == pytest.approx(15) and row["timed_runs"] == 6 and row["rounds"] == 2
    assert row["ms_per_token_rounds"] == pytest.approx([12, 16])
    assert row["steady_peak_bytes"] == {"resident": 7} and row["peak_memory_bytes"] == 7 and row["bits"] == 4
    assert "runs" not in row


@pytest.fixture(scope="module")
def measured(tiny_path, lesions):
    """A tiny model's replica and its profile, whose every token but one would end an answer."""
    replica = LlavaReplica(ModelSpec(tiny_path))
    replica.model.generation_config.eos_token_id = list(range(511))
    return replica, replica.profile(draw_samples(lesions)[0], 1, 4, 40, "plain")


def test_phases_make_up_the_total(measured):
    _, row = measured
    assert len(row["runs"]) == 4 and row["timed_tokens"] == 40 and row["decode"] == "plain"
    for run in row["runs"]:
        phases = [run[name] for name in ("preprocess_ms", "encode_ms", "prefill_ms", "decode_ms")]
        assert min(phases) > 0 and sum(phases) == pytest.approx(run["total_ms"], rel=1e-6)
        assert run["decode_ms"] == pytest.approx(39 * run["ms_per_token"])
        assert run["decode_ms"] > run["first_token_ms"], "39 tokens take longer than the first"


def test_times_are_those_of_the_wall(measured, lesions):
    """What the phases add up to is what a clock around everything sees."""
    replica, _ = measured
    sample = draw_samples(lesions)[0]
    started = actors.profiler.time.perf_counter()
    runs = measure(replica.model, lambda: replica._pixels(sample), Plain(replica.model), 0, 3, 40)
    wall = (actors.profiler.time.perf_counter() - started) * 1e3
    assert 0.8 * wall < sum(run["total_ms"] for run in runs) < wall


def test_facts_of_the_model(measured, tiny_path):
    """Parameters counted tensor by tensor, layers, and what the weights take: 4 bytes each in float32."""
    replica, row = measured
    assert row["params"] == sum(parameter.numel() for parameter in replica.model.parameters())
    assert row["layers"] == 5 and row["stored_bits"] == row["bits"] == 32
    assert row["weight_bytes"] == stored_bytes(tiny_path) == 4 * row["params"]
    assert row["device"] == "CPU" and row["threads"] == torch.get_num_threads()


@pytest.mark.parametrize(
    ("fields", "bits"),
    [
        ({}, 16),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, 4),
        ({"quantization_config": {"load_in_4bit": True}}, 4),
        ({"quantization_config": {"load_in_4bit": False, "load_in_8bit": True}}, 8),
        ({"simulated_quantization": {"bits": 3}}, 3),
    ],
)
def test_bits_of_a_config(fields, bits):
    assert weight_bits(SimpleNamespace(**fields), 16) == bits


def test_resident_peak_restarts():
    """256 MiB that come and go are in the peak until it is restarted."""
    assert footprint.restart_peak("cpu")
    before = footprint.peak("cpu")["resident"]
    block = torch.ones(64 * MIB)
    del block
    assert 250 * MIB < footprint.peak("cpu")["resident"] - before < 300 * MIB
    assert footprint.restart_peak("cpu")
    assert footprint.peak("cpu")["resident"] < before + 50 * MIB
    assert abs(footprint.taken("cpu")["resident"] - footprint.peak("cpu")["resident"]) < 20 * MIB


def test_a_system_that_cannot_restart_the_peak_is_told_apart(monkeypatch):
    def refused(*_):
        raise PermissionError

    monkeypatch.setattr(Path, "write_text", refused)
    assert footprint.restart_peak("cpu") is False


def test_memory_grows_with_the_model(tiny_path, wide_path, probe):
    """A model that is 160 MiB larger takes about that much more, while loading and while answering."""
    rows = {}
    for path in (tiny_path, wide_path):
        assert footprint.restart_peak("cpu")
        rows[path] = LlavaReplica(ModelSpec(path)).profile(probe, 0, 1, 2, "plain")
    small, large = rows[tiny_path], rows[wide_path]
    for when in ("load_peak_bytes", "steady_peak_bytes"):
        assert 120 * MIB < large[when]["resident"] - small[when]["resident"] < 400 * MIB
        assert large[when]["resident"] > large["baseline_bytes"]["resident"] + 120 * MIB
    assert abs(large["baseline_bytes"]["resident"] - small["baseline_bytes"]["resident"]) < 40 * MIB
    assert large["peak_memory_bytes"] == large["steady_peak_bytes"]["resident"] and large["peak_restarted"]
    assert large["peak_memory_kind"] == "process, resident"


def test_peaks_on_gpus_are_summed(monkeypatch):
    """Two cards, each 10 GiB with 7 free: 2 GiB reserved now, 2.5 at the peak, so 1 GiB of context each."""
    cuda = {"device_count": 2, "max_memory_allocated": 2 * GIB, "max_memory_reserved": 5 * GIB // 2}
    cuda |= {"memory_allocated": GIB, "memory_reserved": 2 * GIB, "mem_get_info": (7 * GIB, 10 * GIB)}
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    assert footprint.taken("cuda") == {"allocated": 2 * GIB, "reserved": 4 * GIB, "fullest": 3 * GIB, "driver": 6 * GIB}
    peak = {"allocated": 4 * GIB, "reserved": 5 * GIB, "fullest": 7 * GIB // 2, "driver": 7 * GIB}
    assert footprint.peak("cuda") == peak
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert footprint.taken("cuda") == {"allocated": GIB, "reserved": 2 * GIB, "driver": 3 * GIB}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert footprint.context_bytes() == 2 * GIB
