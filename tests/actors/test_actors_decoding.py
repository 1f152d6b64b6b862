"""Static decoding gives plain generate's tokens, or says why it cannot."""

import json
import re
import shutil

import pytest
import torch
from transformers import GenerationConfig

import actors.decoding
from actors.decoding import DECODERS, NEUTRAL, Plain, Static, check_greedy
from actors.replica import LlavaReplica
from actors.specs import ModelSpec
from tests.tiny import draw_samples, save_tiny, tiny_model


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
        found = static(prompt, 12, lambda ticks=ticks: ticks.append(1))
        assert found == Plain(replica.model)(prompt, 12, lambda: None) and len(found) == len(ticks) == 12
        assert not {first[3], first[5]} & set(found)


@pytest.mark.slow
def test_compiled_decoding_gives_the_same_tokens(tiny_path, lesions):
    replica = LlavaReplica(ModelSpec(tiny_path))
    sample = draw_samples(lesions)[0]
    static, plain = (DECODERS[decode](replica.model) for decode in ("static", "plain"))
    prompt = replica._pixels(sample)
    assert static(prompt, 24, lambda: None) == plain(prompt, 24, lambda: None)
    assert replica.profile(sample, 1, 2, 8, "static")["decode"] == "static"


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
    with pytest.raises(ValueError, match="one GPU, the model is on 2"):
        Static(tiny_model("clip-llama"))


@pytest.mark.parametrize(
    ("name", "value"), [("repetition_penalty", 1.1), ("suppress_tokens", [7]), ("min_new_tokens", 3), ("num_beams", 2)]
)
def test_what_generate_would_do_besides_is_refused(tiny_path, tmp_path, name, value):
    """The engine takes the best token; with such a config `generate` would not, and the two would differ silently."""
    shutil.copytree(tiny_path, tmp_path / "copy")
    file = tmp_path / "copy" / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    with pytest.raises(ValueError, match=rf"copy' sets {name} to {re.escape(str(value))} in .*remove it there"):
        LlavaReplica(ModelSpec(str(file.parent)))


def test_neutral_and_sampling_settings_pass():
    """What asks for nothing, and what only sampling reads."""
    neutral = {name: value for name, value in NEUTRAL.items() if value is not None}
    check_greedy(GenerationConfig(**neutral, suppress_tokens=[], do_sample=True, temperature=0.2, top_p=0.9), "x")
