"""GGUF files: llama.cpp, in a process of its own, answers with them as transformers does."""

import json
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerFast

from actors.checkpoint.config import read_config
from actors.checkpoint.loading import load_processor
from actors.export import llama_cpp
from actors.export.comparison import compare, refusal
from actors.export.exporter import Exporter
from actors.export.formats import FORMATS
from actors.export.ggml import TYPES, Kind, check_widths
from actors.export.gguf_export import MMPROJ, check_gguf
from actors.export.gguf_text import context_length, interleave
from actors.export.gguf_tokenizer import _scores, chat_template, split_name
from actors.maths.blocks import q4_1_blocks
from actors.maths.rounding import dequantize, gemm_tensors, round_to_nearest, unpack
from actors.narrowing.narrower import narrow_config
from actors.specs import ExportSettings, GateError, ModelSpec, Sample
from tests.tiny import DERM_TINY, processor_for, random_model, save_tiny, tiny_config

SETTINGS = ExportSettings("gguf", "F16", "last")
WITHOUT_WINDOW = ("clip-llama", "siglip-llama", "clip-llama-tied", "clip-qwen2", "clip-phi", "siglip-phi")
needs_llama_cpp = pytest.mark.skipif(
    __import__("importlib.util").util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed"
)


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> list[Sample]:
    """Two questions about two images, one of which is not square."""
    from actors.images import probe_image

    folder = tmp_path_factory.mktemp("images")
    probe_image().save(folder / "square.png")
    probe_image().crop((0, 10, 96, 70)).save(folder / "wide.png")
    texts = ("Describe the lesion.", "What is the name of this disease?")
    return [
        Sample(text, str(folder / name), text) for text, name in zip(texts, ("square.png", "wide.png"), strict=True)
    ]


def export(path, out: Path, samples, settings: ExportSettings = SETTINGS) -> dict:
    out.mkdir()
    spec, exporter = ModelSpec(str(path), gpus=0), Exporter()
    exporter.write(spec, settings, "a model", "apache-2.0", str(out))
    return exporter.check(spec, settings, samples, 8, str(out))["agreement"]


@needs_llama_cpp
@pytest.mark.parametrize("name", WITHOUT_WINDOW)
def test_llama_cpp_answers_as_transformers(name, tmp_path, samples):
    """The same tokens; the first token's log-probabilities within .05 nats."""
    found = export(save_tiny(tmp_path / "model", name), tmp_path / "out", samples)
    assert found["prompts"] and found["first_token_nats"] < 0.05
    assert found["same_answers"] == 1 or found["gap_nats"] < 0.05


@needs_llama_cpp
def test_a_narrow_llama_with_heads_of_another_size(tmp_path, samples):
    """Mistral-typed, three heads of 16 at width 64, as jobs.prune writes it."""
    narrow = narrow_config(tiny_config("clip-llama"), 0.75, 32)
    assert narrow.text_config.model_type == "mistral" and narrow.text_config.num_attention_heads == 3
    random_model(narrow).save_pretrained(tmp_path / "model")
    processor_for("clip").save_pretrained(tmp_path / "model")
    assert export(tmp_path / "model", tmp_path / "out", samples)["first_token_nats"] < 0.05


def like_llamas(folder: Path) -> None:
    """Give a saved tiny model a tokenizer as LLaVA-1.5's: BPE with bytes to fall back on, and spaces as letters."""
    texts = ["USER: What is the name of this disease? ASSISTANT: This is a lesion.", "Describe the lesion."]
    marked = ["\u2581" + text.replace(" ", "\u2581") for text in texts]
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    model = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=specials, show_progress=False)
    model.train_from_iterator(marked, trainer)
    stored = json.loads(model.to_str())
    stored["added_tokens"] = [each for each in stored["added_tokens"] if each["id"] < 3]
    stored["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "\u2581"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        ],
    }
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(stored)),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )
    fast.add_special_tokens({"additional_special_tokens": ["<image>"]})
    fast.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    processor = load_processor(str(folder))
    processor.tokenizer = fast
    processor.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["image_token_index"] = config["image_token_id"] = fast.convert_tokens_to_ids("<image>")
    (folder / "config.json").write_text(json.dumps(config))


@needs_llama_cpp
def test_a_tokenizer_like_llamas(tmp_path, samples):
    """Its prompts have the same tokens in llama.cpp: spaces at the front, letters it has never seen, merges by rank."""
    save_tiny(tmp_path / "model", "clip-llama")
    like_llamas(tmp_path / "model")
    texts = ("Describe the lesion.", "Is it  \u00fcber-lesion? 12", " the name\nof this")
    asked = [Sample(text, samples[0].image, text) for text in texts]
    found = export(tmp_path / "model", tmp_path / "out", asked)
    assert found["prompts"] and found["first_token_nats"] < 0.05


@needs_llama_cpp
def test_the_check_refuses_a_wrong_file(tmp_path, samples):
    """A q that is not permuted; positions for another place of the class token, with the remedy."""
    with pytest.raises(GateError, match=r"try --export\.class_token last"):
        export(DERM_TINY, tmp_path / "first", samples, replace(SETTINGS, class_token="first"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("actors.export.gguf_text.interleave", lambda tensor, heads: tensor)
        with pytest.raises(GateError, match="nats"):
            export(DERM_TINY, tmp_path / "plain", samples)


@needs_llama_cpp
def test_derm_tiny_in_four_bits(tmp_path, samples):
    """Smaller than half of 16 bits; a file that is cut is refused in llama.cpp's words."""
    sizes = {}
    for name in ("F16", "Q4_0"):
        found = export(DERM_TINY, tmp_path / name, samples, replace(SETTINGS, type=name))
        assert found["prompts"]
        sizes[name] = (tmp_path / name / f"model-{name}.gguf").stat().st_size
    assert sizes["Q4_0"] < 0.5 * sizes["F16"]
    file = tmp_path / "F16" / MMPROJ
    file.write_bytes(file.read_bytes()[:-5000])
    files = llama_cpp.Files(str(tmp_path / "F16" / "model-F16.gguf"), str(file), 256)
    with pytest.raises(ValueError, match=r"llama\.cpp fails"):
        llama_cpp.answer(files, [llama_cpp.Prompt(samples[0].image, "What?")], 2)


@needs_llama_cpp
def test_latency_counts_every_token(tmp_path, samples):
    export(DERM_TINY, tmp_path / "out", samples[:1])
    files = llama_cpp.Files(str(tmp_path / "out" / "model-F16.gguf"), str(tmp_path / "out" / MMPROJ), 256)
    found = llama_cpp.measure(files, llama_cpp.Prompt(samples[0].image, "What?"), 1, 2, 6)
    assert len(found["runs"]) == 2
    for run in found["runs"]:
        assert run["total_ms"] == pytest.approx(run["first_token_ms"] + 5 * run["ms_per_token"], rel=0.01)
    assert found["load_peak_bytes"] > found["baseline_bytes"] > 2**20


def test_types_are_those_of_the_format():
    assert FORMATS["gguf"].types == tuple(TYPES)


def test_widths_name_the_types_that_would_do():
    check_widths("F16", [33])
    check_widths("Q4_0", [64, 96])
    with pytest.raises(ValueError, match="input channels together, and a linear has 80: choose F16"):
        check_widths("Q4_0", [64, 80])


def test_interleave_puts_the_halves_of_a_head_side_by_side():
    rows = torch.arange(8)[:, None]
    assert interleave(rows, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert interleave(rows, 0) is rows


def test_awq_codes_are_the_same_numbers_in_q4_1():
    """Two groups of 64 in four blocks; the package reads what we pack, within float16's rounding of the minimum."""
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    q, zero, scale = round_to_nearest(weight, 64)
    blocks = q4_1_blocks(q.numpy(), zero.numpy(), scale.float().numpy())
    assert blocks.shape == (8, 4 * 20)
    read = gguf.dequantize(blocks, Kind.Q4_1)
    assert np.abs(read - dequantize(q, zero, scale).numpy()).max() < 2e-3
    stored = gemm_tensors(weight, 64)
    assert np.array_equal(unpack(stored["qweight"]).T.numpy(), q.numpy())
    with pytest.raises(ValueError, match="Groups of 16"):
        q4_1_blocks(q[:, :32].numpy(), zero.numpy(), scale.float().numpy())


def test_templates_render_the_prompts_of_transformers():
    """llama.cpp hands over a text with a marker, alone or in a part; another turn has none."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    stored = load_processor(str(DERM_TINY)).chat_template
    ours, theirs = (environment.from_string(text) for text in (stored, chat_template(stored)))
    image = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    turns = [
        {"role": "user", "content": image},
        {"role": "assistant", "content": [{"type": "text", "text": "A lesion."}]},
    ]
    wanted = ours.render(messages=turns, add_generation_prompt=True).replace("<image>", "<__media_x1__>")
    marked = "<__media_x1__>What is it?"
    for content in (marked, [{"type": "text", "text": marked}]):
        given = [{"role": "user", "content": content}, {"role": "assistant", "content": "A lesion."}]
        assert theirs.render(messages=given, add_generation_prompt=True) == wanted


def test_tokenizers_that_llama_cpp_cannot_follow_are_refused():
    plain = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    assert split_name(plain) == "gpt-2"
    assert split_name({"type": "Sequence", "pretokenizers": [digits, plain]}) == "smollm"
    with pytest.raises(ValueError, match="none here is known"):
        split_name({"type": "Whitespace"})
    assert _scores(["a", "b", "ab", "abb"], [["a", "b"], ["ab", "b"]]) == [-2, -2, 0, -1]
    with pytest.raises(ValueError, match="do not stand together"):
        _scores(["abb"], [["a", "bb"], ["a", "b"], ["ab", "b"]])


def test_windows_shorten_the_context():
    """llama.cpp attends to all tokens: within the window both compute the same."""
    assert context_length(tiny_config("clip-mistral-window").text_config) == 8
    assert context_length(tiny_config("clip-qwen2").text_config) == 512


def test_what_llama_cpp_computes_otherwise_is_refused():
    processor = processor_for("clip")
    for change, words in (
        ({"vision_feature_select_strategy": "full"}, "takes the features 'default'"),
        ({"projector_hidden_act": "relu"}, "gelu in a projector"),
        ({"vision_feature_layer": [-2, -1]}, "Features of one layer"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "before rounding"),
    ):
        config = tiny_config("clip-llama")
        for name, value in change.items():
            setattr(config, name, value)
        with pytest.raises(ValueError, match=words):
            check_gguf(config, processor, "F16")
    config = tiny_config("clip-llama")
    config.text_config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(ValueError, match="default rotary positions"):
        check_gguf(config, processor, "F16")


def test_comparison_by_hand():
    steps = [{1: -0.1, 2: -3.0}, {3: -0.2, 4: -0.3}]
    ours = {"prompt_tokens": 9, "ids": [1, 3], "steps": steps}
    theirs = {"prompt_tokens": 9, "ids": [1, 4], "first": {"1": -0.15, "2": -3.5}}
    found = compare([ours], [theirs])
    assert found["first_token_nats"] == pytest.approx(0.5) and found["gap_nats"] == pytest.approx(0.1)
    assert (found["same_answers"], found["same_tokens"]) == (0, 0.5)
    assert "0.5 nats" in str(refusal("F16", found)) and refusal("Q4_0", found) is None
    assert "chat template" in str(refusal("Q4_0", compare([ours], [{**theirs, "prompt_tokens": 8}])))


def test_keys_of_a_pruned_model(tmp_path):
    """Blocks count from 0; the tower stops at its feature layer, and nothing after it is stored."""
    save_tiny(tmp_path / "model", "clip-llama", layers=2)
    (tmp_path / "out").mkdir()
    Exporter().write(ModelSpec(str(tmp_path / "model")), SETTINGS, "a model", None, str(tmp_path / "out"))
    text = gguf.GGUFReader(tmp_path / "out" / "model-F16.gguf")
    assert text.fields["llama.block_count"].contents() == 2
    assert {tensor.name.split(".")[1] for tensor in text.tensors if tensor.name.startswith("blk.")} == {"0", "1"}
    vision = gguf.GGUFReader(tmp_path / "out" / MMPROJ)
    assert vision.fields["clip.vision.block_count"].contents() == 2
    assert {tensor.name.split(".")[2] for tensor in vision.tensors if tensor.name.startswith("v.blk.")} == {"0", "1"}
    assert not [tensor for tensor in vision.tensors if "post_ln" in tensor.name]
    config = read_config(tmp_path / "model")
    assert len(text.fields["tokenizer.ggml.tokens"].data) == config.text_config.vocab_size
    assert json.loads((tmp_path / "model" / "config.json").read_text())["text_config"]["num_hidden_layers"] == 2
