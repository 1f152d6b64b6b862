"""Surgery on files: pruned checkpoints hold the right tensors under the right names and load everywhere."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaNextConfig

from actors.checkpoint.config import check_llava
from actors.checkpoint.pruning import Surgeon, prune_checkpoint
from actors.checkpoint.tensors import iterate_tensors, publish_names, published_name, stored_bytes, write_tensors
from tests.tiny import (
    ARCHITECTURES,
    LAYERS,
    draw_samples,
    plain_inputs,
    plain_model,
    processor_for,
    rename_tensors,
    save_tiny,
    tiny_config,
)

REMOVED = (0, 3)
KEPT = (1, 2, 4)
LAYER = "language_model.model.layers."

# Loads every folder named on the command line with plain transformers; prints one JSON line each.
PROBE = """
import json, sys, torch
from transformers import AutoModelForImageTextToText
for folder in sys.argv[1:]:
    model, info = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    ids = torch.tensor([[1, 9, 40, 77, 300]])
    logits = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    left = sorted(str(name) for names in info.values() for name in names)
    types = getattr(model.config.text_config, "layer_types", None)
    layers = [layer.self_attn.layer_idx for layer in model.model.language_model.layers]
    print("ROW" + json.dumps({"left": left, "types": types, "layers": layers, "logits": logits[0, -1].tolist()}))
"""


def save_style(folder: Path, style: str) -> str:
    save_tiny(folder, "clip-llama")
    rename_tensors(folder, style)
    return str(folder)


def shard(folder: Path, shard_bytes: int) -> None:
    """Rewrite a checkpoint's one file as shards."""
    tensors = list(iterate_tensors(folder))
    (folder / "model.safetensors").unlink()
    write_tensors(folder, iter(tensors), shard_bytes)


def probe(folders: list[str]) -> list[dict]:
    run = subprocess.run([sys.executable, "-c", PROBE, *folders], capture_output=True, text=True, check=True)
    return [json.loads(line.removeprefix("ROW")) for line in run.stdout.splitlines() if line.startswith("ROW")]


@torch.inference_mode()
def text_logits(model) -> torch.Tensor:
    ids = torch.tensor([[1, 9, 40, 77, 300]])
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1]


def test_pruned_checkpoints_load_in_a_fresh_process(tmp_path):
    """Both naming styles, shards in and one file out, and a config with layer types: nothing missing, same logits."""
    from tests.tiny import tiny_model

    sources = [save_style(tmp_path / "published", "published"), save_style(tmp_path / "five", "five")]
    sources += [save_style(tmp_path / "sharded", "published"), save_tiny(tmp_path / "mixed", "clip-qwen2-mixed")]
    shard(tmp_path / "sharded", 40_000)
    outs = [f"{source}-pruned" for source in sources]
    for source, out in zip(sources, outs, strict=True):
        assert prune_checkpoint(source, out, [3, 0]) == {"removed": [0, 3], "layers": 3}
    rows = probe(outs)
    assert [row["left"] for row in rows] == [[], [], [], []]
    assert [row["layers"] for row in rows] == [[0, 1, 2]] * 4
    assert rows[3]["types"] == ["full_attention", "sliding_attention", "sliding_attention"]
    for row, name in zip(rows, ["clip-llama"] * 3 + ["clip-qwen2-mixed"], strict=True):
        assert torch.allclose(torch.tensor(row["logits"]), pruned_by_hand(tiny_model(name)), atol=1e-4)


def pruned_by_hand(model) -> torch.Tensor:
    """Logits of a model whose layer list is cut in memory."""
    decoder = model.model.language_model
    decoder.layers = torch.nn.ModuleList(decoder.layers[i] for i in KEPT)
    text = decoder.config
    if getattr(text, "layer_types", None):
        text.layer_types = [text.layer_types[i] for i in KEPT]
    text.num_hidden_layers = len(KEPT)
    for index, layer in enumerate(decoder.layers):
        layer.self_attn.layer_idx = index
    return text_logits(model)


@pytest.mark.parametrize("style", ["published", "five"])
def test_every_kept_tensor_is_unchanged(tmp_path, style):
    """Names: published, with layers 1, 2, 4 as 0, 1, 2; values and types: bit for bit."""
    odd = "language_model.model.layers.2.mlp.up_proj.weight"
    tensors = load_file(Path(save_style(tmp_path / "a", "published")) / "model.safetensors")
    tensors[odd] = tensors[odd].to(torch.bfloat16)
    save_file(tensors, tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})
    if style == "five":
        rename_tensors(tmp_path / "a", style)
        assert not set(tensors) & set(load_file(tmp_path / "a" / "model.safetensors"))
    prune_checkpoint(str(tmp_path / "a"), str(tmp_path / "b"), REMOVED)
    expected = {}
    for name, tensor in tensors.items():
        if name.startswith(LAYER):
            number, rest = name.removeprefix(LAYER).split(".", 1)
            if int(number) in KEPT:
                expected[f"{LAYER}{KEPT.index(int(number))}.{rest}"] = tensor
        else:
            expected[name] = tensor
    found = load_file(tmp_path / "b" / "model.safetensors")
    assert sorted(found) == sorted(expected)
    assert all(found[name].dtype == expected[name].dtype for name in found)
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert sum(".encoder.layers." in name for name in found) == sum(".encoder.layers." in name for name in tensors)


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("model.language_model.embed_tokens.weight", "language_model.model.embed_tokens.weight"),
        ("lm_head.weight", "language_model.lm_head.weight"),
        ("lm_head.bias", "language_model.lm_head.bias"),
        ("model.language_model.final_layernorm.bias", "language_model.model.final_layernorm.bias"),
        (
            "model.language_model.layers.3.self_attn.dense.weight",
            "language_model.model.layers.3.self_attn.dense.weight",
        ),
        ("model.vision_tower.head.probe", "vision_tower.vision_model.head.probe"),
        ("vision_tower.encoder.layers.0.mlp.fc1.bias", "vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias"),
        ("vision_tower.pre_layrnorm.weight", "vision_tower.vision_model.pre_layrnorm.weight"),
        ("model.multi_modal_projector.linear_1.bias", "multi_modal_projector.linear_1.bias"),
    ],
)
def test_published_names(written, name):
    """As in the llava-hf checkpoints; a published name stays."""
    assert published_name(written) == name == published_name(name)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_renamed_checkpoints_load_the_same(tmp_path, name, lesions):
    """Bit for bit the logits of an image and a question; all tensors are there once, tied embeddings too."""
    save_tiny(tmp_path, name)
    rename_tensors(tmp_path, "five")
    processor, (sample, *_) = processor_for(name.split("-")[0]), draw_samples(lesions, 1)
    shard(tmp_path, 100_000)
    (before, names), tensors = image_logits(tmp_path, processor, sample), dict(iterate_tensors(tmp_path))
    for _ in range(2):  # the second time there is nothing to do
        publish_names(tmp_path)
        after, renamed = image_logits(tmp_path, processor, sample)
        assert torch.equal(before, after) and names == renamed
    found = dict(iterate_tensors(tmp_path))
    assert sorted(found) == sorted(map(published_name, tensors))
    assert all(torch.equal(found[published_name(n)], t) for n, t in tensors.items())
    assert ("language_model.lm_head.weight" in found) == (name != "clip-llama-tied")
    assert not [path.name for path in tmp_path.iterdir() if path.is_dir()]


@torch.inference_mode()
def image_logits(folder: Path, processor, sample) -> tuple[torch.Tensor, list[str]]:
    model = plain_model(str(folder))
    return model(**plain_inputs(processor, sample)).logits, sorted(name for name, _ in model.named_parameters())


def test_removing_nothing_copies(tiny_path, tmp_path):
    """An empty removal keeps all five layers and all companions."""
    assert prune_checkpoint(tiny_path, str(tmp_path), []) == {"removed": [], "layers": LAYERS}
    names = {file.name for file in Path(tiny_path).iterdir()}
    assert {file.name for file in tmp_path.iterdir()} == names
    assert stored_bytes(str(tmp_path)) == stored_bytes(tiny_path)


def test_companions_travel(tiny_path, tmp_path):
    """Chat template, tokenizer and processor arrive byte for byte, so the pruned folder is complete."""
    Surgeon().prune(tiny_path, str(tmp_path), [1])
    for name in ("chat_template.jinja", "tokenizer.json", "processor_config.json", "generation_config.json"):
        assert (tmp_path / name).read_bytes() == (Path(tiny_path) / name).read_bytes()


def test_window_start_moves_with_the_layers(tmp_path):
    """max_window_layers 2 means that layers 0 and 1 do not slide; without layer 0 it is 1."""
    source = save_tiny(tmp_path / "a", "clip-qwen2-mixed")
    prune_checkpoint(source, str(tmp_path / "b"), [0, 4])
    text = json.loads((tmp_path / "b" / "config.json").read_text())["text_config"]
    assert text["num_hidden_layers"] == 3 and text["max_window_layers"] == 1
    assert text["layer_types"] == ["full_attention", "sliding_attention", "sliding_attention"]


@pytest.mark.parametrize(
    ("removed", "words"),
    [
        ([5], "Layer 5 cannot be removed: the model has layers 0 to 4"),
        ([-1], "Layer -1 cannot be removed"),
        ([2, 2], "names a layer twice"),
        ([0, 1, 2, 3, 4], "at least one must stay"),
    ],
)
def test_impossible_removals(tiny_path, tmp_path, removed, words):
    """Out of range, twice, all: a ValueError before anything is written."""
    with pytest.raises(ValueError, match=words):
        prune_checkpoint(tiny_path, str(tmp_path / "out"), removed)
    assert not (tmp_path / "out").exists()


def test_only_llava_itself_is_taken():
    config = tiny_config("clip-llama")
    assert config.architectures is None and check_llava(config) is config
    config.architectures = ["LlavaForConditionalGeneration"]
    assert check_llava(config) is config
    config.architectures = ["LlavaNextForConditionalGeneration"]
    with pytest.raises(ValueError, match=r"names the architectures \['LlavaNextFor.* give a checkpoint of that kind"):
        check_llava(config)
    with pytest.raises(ValueError, match="of a 'llava_next' names the architectures None"):
        check_llava(LlavaNextConfig())


def test_quantized_checkpoint_is_not_pruned(tmp_path):
    """Prune first, then quantize: the message says so."""
    source = save_tiny(tmp_path / "a", "clip-llama")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 64}
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is quantized: prune the original, then quantize"):
        prune_checkpoint(source, str(tmp_path / "b"), [1])


def test_files_that_disagree_with_the_config(tmp_path):
    """A config that says 6 layers beside tensors of 5: both numbers are in the message."""
    source = save_tiny(tmp_path / "a", "clip-llama")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 6
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"5 decoder layers but its config\.json says 6"):
        prune_checkpoint(source, str(tmp_path / "b"), [1])


def test_processor_is_shared(tmp_path):
    """The pruned folder's processor gives the ids of the source's."""
    from transformers import AutoProcessor

    prune_checkpoint(save_tiny(tmp_path / "a", "siglip-llama"), str(tmp_path / "b"), [2])
    text = "USER: <image>\nName? ASSISTANT:"
    mine = AutoProcessor.from_pretrained(tmp_path / "b").tokenizer(text)["input_ids"]
    assert mine == processor_for("siglip").tokenizer(text)["input_ids"]
