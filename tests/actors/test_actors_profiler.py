"""The profiler's formulas with a fake model and a fake clock, and its token count on a real one."""

from types import SimpleNamespace

import pytest
import torch

import actors.profiler
from actors.profiler import measure
from actors.replica import LlavaReplica
from actors.specs import ModelSpec
from actors.surgery import stored_bytes
from tests.tiny import draw_samples


class FakeModel:
    """Takes 100 ms for the first token and `pace` ms for each next one, a different pace in each run."""

    def __init__(self, clock: SimpleNamespace, paces: list[float]):
        self.clock, self.paces, self.calls = clock, list(paces), []

    def generate(self, min_new_tokens, max_new_tokens, do_sample, stopping_criteria, **inputs):
        assert min_new_tokens == max_new_tokens and do_sample is False
        self.calls.append(inputs)
        pace = self.paces.pop(0)
        ids = torch.zeros(1, 3, dtype=torch.long)
        for number in range(max_new_tokens):
            self.clock.now += 0.1 if number == 0 else pace / 1e3
            ids = torch.cat([ids, torch.ones(1, 1, dtype=torch.long)], dim=1)
            assert not stopping_criteria[0](ids, None).any()


@pytest.fixture
def clock(monkeypatch):
    fake = SimpleNamespace(now=50.0)
    monkeypatch.setattr(actors.profiler, "time", SimpleNamespace(perf_counter=lambda: fake.now))
    return fake


def test_formulas(clock):
    """Paces 10, 12, 20 ms after a slow warm-up: median 12; end to end 100 + 9 x 12 = 208 ms, 20.8 ms per token."""
    model = FakeModel(clock, [500, 10, 20, 12])
    row = measure(model, {"input_ids": "x"}, warmup_runs=1, timed_runs=3, new_tokens=10)
    assert row["first_token_ms"] == pytest.approx(100)
    assert row["ms_per_token"] == pytest.approx(12)
    assert row["naive_ms_per_token"] == pytest.approx(20.8)
    # inclusive percentiles of 10, 12, 20: 10 + 0.1 x 2 and 12 + 0.9 x 8
    assert row["ms_per_token_p5_p95"] == pytest.approx([10.2, 19.2])
    assert (row["timed_runs"], row["timed_tokens"]) == (3, 10)
    assert model.calls == [{"input_ids": "x"}] * 4


def test_one_timed_run(clock):
    """A single run is its own percentile."""
    row = measure(FakeModel(clock, [7]), {}, warmup_runs=0, timed_runs=1, new_tokens=5)
    assert row["ms_per_token"] == pytest.approx(7) and row["ms_per_token_p5_p95"] == pytest.approx([7, 7])


def test_peak_memory_is_this_process(clock):
    """On a CPU: the resident set, in bytes, more than torch's own libraries and less than the machine's memory."""
    row = measure(FakeModel(clock, [1]), {}, warmup_runs=0, timed_runs=1, new_tokens=2)
    if not torch.cuda.is_available():
        assert row["peak_memory_kind"] == "process, resident" and 10**8 < row["peak_memory_bytes"] < 10**12
        assert row["device"] == "CPU" and row["threads"] == torch.get_num_threads()


def test_exact_token_count_on_a_real_model(tiny_path, lesions, monkeypatch):
    """All 512 tokens but one end an answer, and still nine tokens are generated, in every run."""
    replica = LlavaReplica(ModelSpec(tiny_path))
    replica.model.generation_config.eos_token_id = list(range(511))
    lengths = []
    generate = replica.model.generate

    def counted(**arguments):
        out = generate(**arguments)
        lengths.append(out.shape[1] - arguments["input_ids"].shape[1])
        return out

    monkeypatch.setattr(replica.model, "generate", counted)
    row = replica.profile(draw_samples(lesions)[0], warmup_runs=1, timed_runs=2, new_tokens=9)
    assert lengths == [9, 9, 9]
    assert row["first_token_ms"] > 0 and row["ms_per_token"] > 0 and row["timed_tokens"] == 9


def test_facts_of_the_model(tiny_path, lesions):
    """Parameters counted tensor by tensor, layers, and what the weights take: 4 bytes each in float32."""
    replica = LlavaReplica(ModelSpec(tiny_path))
    row = replica.profile(draw_samples(lesions)[0], warmup_runs=0, timed_runs=1, new_tokens=2)
    assert row["params"] == sum(parameter.numel() for parameter in replica.model.parameters())
    assert row["layers"] == 5 and row["stored_bits"] == 32
    assert row["weight_bytes"] == stored_bytes(tiny_path) == 4 * row["params"]
