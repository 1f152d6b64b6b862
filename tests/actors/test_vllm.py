"""What Prunella writes, loaded by a real vLLM on the CPU: its greedy answers are those of plain transformers."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, Qwen2Config

from actors.checkpoint.config import read_config
from actors.checkpoint.loading import load_model, load_processor
from actors.checkpoint.pruning import prune_checkpoint
from actors.gate.vllm import check_vllm
from actors.narrowing.narrower import Narrower
from actors.quantizers.mixed import MixedQuantizer
from actors.specs import ModelSpec
from actors.training.parts import language_linears
from actors.training.writing import load_stored, write_changed
from tests.quantizing import quantize, settings
from tests.tiny import (
    DERM_TINY,
    config_of,
    draw_conversations,
    draw_samples,
    plain_answer,
    plain_inputs,
    plain_model,
    processor_for,
    random_model,
    rename_tensors,
)
from tests.vllm_runtime import PYTHON, needs_vllm, vllm_answers

pytestmark = [pytest.mark.slow, needs_vllm]

# Heads of 32, the smallest that vLLM computes on a CPU; sizes in multiples of 32.
WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
TEXTS = {
    "llama": (LlamaConfig, {**WIDE, "num_key_value_heads": 4}),
    "mistral": (MistralConfig, {**WIDE, "num_key_value_heads": 2, "head_dim": 32, "sliding_window": None}),
    "qwen2": (Qwen2Config, {**WIDE, "num_key_value_heads": 2}),
}
TOKENS = 16
EXACT = [
    *(f"{tower}-{text}-pruned" for tower in ("clip", "siglip") for text in TEXTS),
    *(f"{tower}-{text}-narrow" for tower in ("clip", "siglip") for text in ("llama", "mistral")),
    *(f"clip-{text}-recovered" for text in TEXTS),
]
ROUNDED = [f"{base}-{made}" for base in ("clip-llama", "siglip-mistral", "clip-qwen2") for made in ("rtn", "awq")]
ROUNDED.append("clip-llama-mixed4")
MIXED = {"mixed4": (4, 16, 4), "mixed8": (4, 16, 8)}
REFUSED = {  # the size of a head from the width (128 / 2 in place of 32); 8 bits with zero points; heads of 16
    "clip-qwen2-narrow": "length (64) exceeds dimension size (32)",
    "clip-llama-mixed8": "Quant type (uint8) not supported by CPUWNA16",
    "derm-tiny": "Unsupported CPU attention configuration: head_dim=16",
}
NEAR = 0.02  # how far below the largest logit, relative to it, the logit of a token in 16 bits may be


def save(folder: Path, tower: str, text: str) -> str:
    """Save a random model of three layers under published names."""
    kind, extra = TEXTS[text]
    random_model(config_of(tower, kind, 3, extra)).save_pretrained(folder)
    processor_for(tower).save_pretrained(folder)
    rename_tensors(folder, "published")
    return str(folder)


def recover(source: str, out: Path) -> None:
    """Write other weights of the decoder's linears as a training writes them."""
    spec = ModelSpec(source)
    model = load_stored(spec)
    with torch.no_grad():
        for name in language_linears(model):
            weight = model.get_submodule(name).weight
            weight.add_(0.1 * weight.std() * torch.randn_like(weight))
    out.mkdir()
    write_changed(model, load_processor(source), spec, out)


def make(name: str, root: Path, conversations) -> str:
    """Make the checkpoint that a name of EXACT, ROUNDED or REFUSED says; return its path."""
    if name == "derm-tiny":
        return str(DERM_TINY)
    base, made = name.rsplit("-", 1)
    source = root / base
    if not source.exists():
        save(source, *base.split("-"))
    out = root / name
    if made == "pruned":
        prune_checkpoint(str(source), str(out), [1])
    elif made == "narrow":
        out.mkdir()
        Narrower(ModelSpec(str(source))).narrow(conversations, 0.75, 64, "magnitude", 0, str(out))
    elif made == "recovered":
        recover(str(source), out)
    elif made in MIXED:
        out.mkdir()
        MixedQuantizer().quantize(ModelSpec(str(source)), settings("rtn"), MIXED[made], [], str(out))
    else:
        quantize(str(source), out, made, conversations)
    return str(out)


@pytest.fixture(scope="module")
def sample(lesions):
    return draw_samples(lesions, images=1)[0]


@pytest.fixture(scope="module")
def answered(lesions, sample, tmp_path_factory) -> dict[str, tuple[str, list[int] | str]]:
    """The path of every checkpoint, and vLLM's answer: all in one process."""
    root, conversations = tmp_path_factory.mktemp("made"), draw_conversations(lesions, 6)
    paths = {name: make(name, root, conversations) for name in (*EXACT, *ROUNDED, *REFUSED)}
    items = [
        {
            "path": path,
            "dtype": "bfloat16" if name in ROUNDED else "float32",
            "prompt": prompt_of(path, sample),
            "image": sample.image,
            "tokens": TOKENS,
        }
        for name, path in paths.items()
    ]
    return {name: (paths[name], said) for name, said in zip(paths, vllm_answers(root, items), strict=True)}


def prompt_of(path: str, sample) -> str:
    content = [{"type": "image"}, {"type": "text", "text": sample.question}]
    messages = [{"role": "user", "content": content}]
    return load_processor(path).apply_chat_template(messages, add_generation_prompt=True)


@pytest.mark.parametrize("name", EXACT)
def test_answers_are_those_of_transformers(answered, sample, name):
    """Token for token, in float32."""
    path, said = answered[name]
    expected = plain_answer(plain_model(path), load_processor(path), sample, TOKENS)
    assert said == expected and len(set(said)) > 2


def test_a_llama_whose_heads_do_not_divide_its_width_was_among_them(answered):
    assert plain_model(answered["clip-llama-narrow"][0]).config.text_config.model_type == "mistral"


@pytest.mark.parametrize("name", ROUNDED)
def test_rounded_answers_are_near_those_of_transformers(answered, sample, name):
    """Each of vLLM's tokens (in bfloat16) is, given those before it, the likeliest in float32 up to NEAR."""
    path, said = answered[name]
    assert isinstance(said, list), said
    model, inputs = load_model(path), plain_inputs(load_processor(path), sample)
    ids = torch.cat([inputs["input_ids"], torch.tensor([said])], 1)
    mask = torch.ones_like(ids)
    with torch.inference_mode():
        logits = model(input_ids=ids, attention_mask=mask, pixel_values=inputs["pixel_values"]).logits[0]
    logits = logits[-len(said) - 1 : -1].float()
    below = (logits.max(1).values - logits[torch.arange(len(said)), said]) / logits.abs().max(1).values
    assert below.max() <= NEAR and len(set(said)) > 2


@pytest.mark.parametrize("name", REFUSED)
def test_what_vllm_refuses(answered, name):
    assert isinstance(answered[name][1], str) and REFUSED[name] in answered[name][1]


def test_the_gate_loads_it_here(answered, monkeypatch):
    monkeypatch.setenv("PRUNELLA_VLLM", str(PYTHON))
    path = answered["clip-llama-pruned"][0]
    assert check_vllm(Path(path), read_config(Path(path)), is_ours=True) == "passed: loaded"
