"""Static decoding gives plain generate's tokens, or says why it cannot."""

import json
import re
import shutil
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig

import actors.decoding
import actors.engine.replica
from actors.decoding import DECODERS, NEUTRAL, Plain, Static, check_greedy
from actors.engine.replica import LlavaReplica
from actors.specs import ModelSpec
from tests.quantizing import PACKED, quantize
from tests.tiny import draw_conversations, draw_samples, save_tiny, tiny_model


def eager(monkeypatch) -> None:
    """Leave the step as it is: what is tested is the loop around it."""
    monkeypatch.setattr(actors.decoding.torch, "compile", lambda step, fullgraph: step)


@pytest.mark.parametrize("name", ["clip-llama", "siglip-llama", "clip-qwen2", "clip-phi"])
def test_static_decoding_gives_the_same_tokens(tmp_path, lesions, monkeypatch, name):
    """Also for a second prompt of another length, and where stop tokens must be passed over."""
    eager(monkeypatch)
    replica = LlavaReplica(ModelSpec(save_tiny(tmp_path, name)))
    prompts = [replica._pixels(sample) for sample in draw_samples(lesions)[:3]]
    first = Plain(replica.model)(prompts[0], 12, lambda: None)
    replica.model.generation_config.eos_token_id = [first[3], first[5]]
    static = Static(replica.model)
    for prompt in [*prompts, prompts[0]]:
        ticks: list[int] = []
        decoded = static(prompt, 12, lambda ticks=ticks: ticks.append(1))
        assert decoded == Plain(replica.model)(prompt, 12, lambda: None) and len(decoded) == len(ticks) == 12
        assert not {first[3], first[5]} & set(decoded)


def test_the_run_that_captures_is_not_measured(tiny_path, probe, monkeypatch):
    """Without warm-up runs one goes before all the same: it feeds the prompt twice, and its times say nothing."""
    eager(monkeypatch)
    prefill, fed = Static._prefill, []
    monkeypatch.setattr(Static, "_prefill", lambda self, inputs: (prefill(self, inputs), fed.append(1)))
    (run,) = LlavaReplica(ModelSpec(tiny_path)).profile(probe, 0, 1, 3, "static")["runs"]
    assert run["ms_per_token"] > 0 and len(fed) == 3


class Graphs:
    """What Static asks of torch.cuda to capture a graph, on the CPU; `events` is what was asked, in order."""

    def __init__(self, monkeypatch, static: Static):
        self.events: list[str] = []
        self._static, self._choose, self._step = static, static._choose, static._step
        streams = {"main": self._stream("main"), "aside": self._stream("aside")}
        fakes = {
            "Stream": lambda device: streams["aside"],
            "current_stream": lambda device: streams["main"],
            "stream": self._inside,
            "CUDAGraph": lambda: SimpleNamespace(replay=self._replay, captured=[]),
            "graph": self._capturing,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(actors.decoding.torch.cuda, name, fake)
        monkeypatch.setattr(static, "_step", self._noted_step)
        monkeypatch.setattr(static, "_device", torch.device("cuda", 0))

    def _stream(self, name: str):
        return SimpleNamespace(
            name=name, wait_stream=lambda other: self.events.append(f"{name} waits for {other.name}")
        )

    @contextmanager
    def _inside(self, stream):
        self.events.append(f"into {stream.name}")
        yield
        self.events.append(f"out of {stream.name}")

    @contextmanager
    def _capturing(self, graph):
        """What is called meanwhile is written down and not computed, as on a GPU."""
        self._static._choose = lambda **inputs: graph.captured.append(inputs)
        yield
        self._static._choose = self._choose
        (inputs,) = graph.captured
        assert inputs["input_ids"] is self._static._token, "a graph reads its input where it was captured"
        self.events.append("captured")

    def _noted_step(self) -> None:
        self.events.append("step")
        self._step()

    def _replay(self) -> None:
        self.events.append("replay")
        self._step()


def test_a_graph_is_captured_once_per_length_and_replayed(tiny_path, lesions, monkeypatch):
    """Two steps on a stream of their own, then the one that is recorded, then a replay for each token but the first."""
    replica = LlavaReplica(ModelSpec(tiny_path))
    static, plain = Static(replica.model), Plain(replica.model)
    graphs = Graphs(monkeypatch, static)
    capture = ["aside waits for main", "into aside", "step", "step", "out of aside", "main waits for aside"]
    capture += ["step", "captured"]
    prompts = [replica._pixels(sample) for sample in draw_samples(lesions)[:2]]
    assert len({prompt["input_ids"].shape for prompt in prompts}) == 2
    for prompt, captures in ((prompts[0], True), (prompts[0], False), (prompts[1], True)):
        graphs.events.clear()
        assert static(prompt, 6, lambda: None) == plain(prompt, 6, lambda: None)
        assert graphs.events == [*(capture if captures else []), *["replay"] * 5]


def test_a_graph_that_cannot_be_captured_is_an_error(tiny_path, lesions, monkeypatch):
    """A kernel that waits for the device; out of memory is passed on as it is."""
    replica = LlavaReplica(ModelSpec(tiny_path))
    static, prompt = Static(replica.model), replica._pixels(draw_samples(lesions)[0])
    graphs = Graphs(monkeypatch, static)
    errors = iter([RuntimeError("operation not permitted when stream is capturing"), torch.OutOfMemoryError("full")])

    @contextmanager
    def capturing(graph):
        raise next(errors)
        yield

    monkeypatch.setattr(actors.decoding.torch.cuda, "graph", capturing)
    with pytest.raises(ValueError, match=r"not permitted when stream is capturing.* set evaluate\.decode plain"):
        static(prompt, 4, lambda: None)
    with pytest.raises(torch.OutOfMemoryError):
        static(prompt, 4, lambda: None)
    assert "replay" not in graphs.events


@pytest.mark.slow
def test_compiled_decoding_gives_the_same_tokens(tiny_path, lesions):
    replica = LlavaReplica(ModelSpec(tiny_path))
    sample = draw_samples(lesions)[0]
    static, plain = (DECODERS[decode](replica.model) for decode in ("static", "plain"))
    prompt = replica._pixels(sample)
    assert static(prompt, 24, lambda: None) == plain(prompt, 24, lambda: None)
    assert replica.profile(sample, 1, 2, 8, "static")["decode"] == "static"


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True], ids=["static", "compiled"])
@pytest.mark.parametrize("method", PACKED)
def test_rounded_models_give_the_same_tokens(tiny_path, lesions, tmp_path, monkeypatch, method, compiled):
    """As plain generate of the same checkpoint, and not those of the model before rounding."""
    if not compiled:
        eager(monkeypatch)
    quantize(tiny_path, tmp_path / "q", method, draw_conversations(lesions, 4))
    replica = LlavaReplica(ModelSpec(str(tmp_path / "q")))
    static, plain = Static(replica.model), Plain(replica.model)
    prompts = [replica._pixels(sample) for sample in draw_samples(lesions)[:2]]
    answers = [plain(prompt, 24, lambda: None) for prompt in prompts]
    assert [static(prompt, 24, lambda: None) for prompt in prompts] == answers
    before = Plain(LlavaReplica(ModelSpec(tiny_path)).model)
    assert answers != [before(prompt, 24, lambda: None) for prompt in prompts]


def test_a_step_that_cannot_be_compiled_is_an_error(tiny_path, probe, monkeypatch):
    def broken(step, fullgraph):
        raise RuntimeError("No working C++ compiler found in torch._inductor.config.cpp.cxx: (None, 'g++')")

    replica = LlavaReplica(ModelSpec(tiny_path))
    monkeypatch.setattr(actors.decoding.torch, "compile", broken)
    with pytest.raises(ValueError, match=r"No working C\+\+ compiler.* set evaluate\.decode plain"):
        replica.profile(probe, 0, 1, 2, "static")


def test_sliding_windows_are_refused(lesions, probe, tmp_path):
    replica = LlavaReplica(ModelSpec(save_tiny(tmp_path, "clip-mistral-window")))
    with pytest.raises(ValueError, match="sliding windows"):
        replica.profile(probe, 0, 1, 2, "static")


def test_static_decoding_refuses_several_devices(monkeypatch):
    devices = [torch.device("cuda", 0), torch.device("cuda", 1)]
    monkeypatch.setattr(actors.decoding, "layer_devices", lambda model: devices)
    with pytest.raises(ValueError, match="one GPU, but the model is on 2"):
        Static(tiny_model("clip-llama"))


@pytest.mark.parametrize(
    ("name", "value"), [("repetition_penalty", 1.1), ("suppress_tokens", [7]), ("min_new_tokens", 3), ("num_beams", 2)]
)
def test_what_generate_would_do_besides_is_refused(tiny_path, tmp_path, monkeypatch, name, value):
    """The engine takes the best token; with such a config `generate` would not, and the two would differ silently.

    It is said before the model is loaded.
    """
    monkeypatch.delattr(actors.engine.replica, "load_model")
    shutil.copytree(tiny_path, tmp_path / "copy")
    file = tmp_path / "copy" / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    with pytest.raises(ValueError, match=rf"copy' sets {name} to {re.escape(str(value))} in .*remove it there"):
        LlavaReplica(ModelSpec(str(file.parent)))


def test_neutral_and_sampling_settings_pass():
    """What asks for nothing, and what only sampling reads."""
    neutral = {name: value for name, value in NEUTRAL.items() if value is not None}
    check_greedy(GenerationConfig(**neutral, suppress_tokens=[], do_sample=True, temperature=0.2, top_p=0.9), "x")
