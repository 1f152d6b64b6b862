"""Strict loading: what is broken in a checkpoint is named before anything is computed from it."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, AutoTokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from actors.checkpoint.loading import check_source, load_model, load_processor, pick_device, pixel_dtype
from actors.checkpoint.pruning import prune_checkpoint
from actors.checkpoint.tensors import iterate_tensors, stored_bytes, write_tensors
from tests.tiny import DERM_TINY

WEIGHTS = "model.safetensors"


@pytest.fixture
def broken(tiny_path, tmp_path):
    """A copy of the tiny checkpoint, to break."""
    return Path(shutil.copytree(tiny_path, tmp_path / "copy"))


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"].update(changes)
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def test_every_weight_arrives(tiny_path):
    """The loaded tensors are the file's, bit for bit, in eval mode and the type asked for."""
    model = load_model(tiny_path)
    stored = load_file(Path(tiny_path) / WEIGHTS)
    name = "layers.3.mlp.gate_proj.weight"
    assert torch.equal(model.model.language_model.get_parameter(name).cpu(), stored[f"language_model.model.{name}"])
    assert sum(p.numel() for p in model.parameters()) == sum(t.numel() for t in stored.values())
    assert not model.training and {p.dtype for p in model.parameters()} == {torch.float32}


def test_float16_is_all_float16(tiny_path):
    """The type of every weight, and of the pixels that the tower expects."""
    model = load_model(tiny_path, dtype="float16")
    assert {p.dtype for p in model.parameters()} == {torch.float16} and pixel_dtype(model) == torch.float16


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_number_is_named(broken, value):
    """One NaN or infinity among 4,096 values of one tensor: the tensor's name is in the message."""
    name = "language_model.model.layers.1.self_attn.q_proj.weight"
    edit_tensors(broken, lambda tensors: tensors[name].view(-1).__setitem__(2000, value))
    with pytest.raises(ValueError, match=r"NaN or infinite values in '.*layers\.1\.self_attn\.q_proj\.weight'"):
        load_model(str(broken))


def test_opposite_infinities_are_found(broken):
    """Plus and minus infinity in one tensor must not cancel."""

    def change(tensors):
        row = tensors["language_model.model.norm.weight"]
        row[0], row[1] = float("inf"), float("-inf")

    edit_tensors(broken, change)
    with pytest.raises(ValueError, match="NaN or infinite"):
        load_model(str(broken))


def test_large_float16_weights_are_fine(broken):
    """4,096 values of 60,000 sum to far more than float16 holds: the check must not call that infinite."""
    name = "language_model.model.layers.1.self_attn.q_proj.weight"
    edit_tensors(broken, lambda tensors: tensors[name].fill_(60_000.0))
    loaded = load_model(str(broken), dtype="float16")
    assert loaded.model.language_model.layers[1].self_attn.q_proj.weight[0, 0].item() == 60_000


def test_missing_tensor_is_named(broken):
    """Without one tensor plain transformers would fill in random numbers."""
    edit_tensors(broken, lambda tensors: tensors.pop("language_model.model.layers.4.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match=r"missing keys '.*layers\.4\.mlp\.up_proj\.weight'"):
        load_model(str(broken))


def test_missing_tower_is_counted(broken):
    """Many missing tensors: the first is named, the others are counted."""

    def change(tensors):
        for name in [name for name in tensors if name.startswith("vision_tower.")]:
            del tensors[name]

    edit_tensors(broken, change)
    with pytest.raises(ValueError, match=r"missing keys 'model\.vision_tower.*' and \d+ more"):
        load_model(str(broken))


def test_missing_shard(broken):
    """A shard that the index names is not there: loading and pruning say which, and what to do."""
    tensors = list(iterate_tensors(broken))
    (broken / WEIGHTS).unlink()
    write_tensors(broken, iter(tensors), shard_bytes=200_000)
    shards = sorted(broken.glob("model-*.safetensors"))
    assert len(shards) > 2
    load_model(str(broken))
    shards[1].unlink()
    words = rf"{shards[1].name}' is missing or damaged .*copy or download it again"
    with pytest.raises(ValueError, match=words):
        load_model(str(broken))
    with pytest.raises(ValueError, match=words):
        prune_checkpoint(str(broken), str(broken / "out"), [0])


def test_truncated_file(broken):
    """A download that stopped half way."""
    data = (broken / WEIGHTS).read_bytes()
    (broken / WEIGHTS).write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors' is missing or damaged"):
        load_model(str(broken))


def test_files_beside_the_checkpoint_do_not_count(broken):
    """transformers reads model.safetensors alone: a consolidated copy beside it is neither counted nor pruned."""
    before = stored_bytes(str(broken))
    save_file({"layers.0.attention.wq.weight": torch.zeros(3)}, broken / "consolidated.safetensors")
    assert stored_bytes(str(broken)) == before
    assert "layers.0.attention.wq.weight" not in dict(iterate_tensors(broken))


@pytest.mark.parametrize(("layers", "kind"), [(6, "missing keys"), (4, "unexpected keys")])
def test_wrong_layer_count(broken, layers, kind):
    """More layers than the files hold, or fewer: both are errors that mention the layer count."""
    edit_config(broken, num_hidden_layers=layers)
    with pytest.raises(ValueError, match=rf"{kind} '.*layers\.[45]\..*layer count"):
        load_model(str(broken))


def test_wrong_shape(broken):
    """A tensor of another shape than the config's."""
    edit_config(broken, intermediate_size=96)
    with pytest.raises((ValueError, RuntimeError), match="mismatch"):
        load_model(str(broken))


@pytest.mark.parametrize("path", ["/nowhere/at/all", "./nowhere", "runs/a/b/c", "nowhere"])
def test_missing_folder(path):
    """What looks local and is not there: the message tells what to give."""
    with pytest.raises(ValueError, match=re.escape(f"No checkpoint at {path!r}") + ".*existing folder or a hub id"):
        load_model(path)


def test_hub_ids_pass_the_check():
    """owner/name is not taken for a folder."""
    assert check_source("llava-hf/llava-1.5-7b-hf") is None


def test_folder_without_config(broken):
    """A folder, but not of a checkpoint."""
    (broken / "config.json").unlink()
    with pytest.raises(ValueError, match=r"folder without config\.json: give a checkpoint folder as model\.path"):
        load_model(str(broken))


def test_folder_without_safetensors(broken):
    """Pickled weights are not loaded."""
    (broken / WEIGHTS).rename(broken / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"holds no \.safetensors file: convert the weights"):
        load_model(str(broken))


def test_no_chat_template(broken):
    """A processor without a chat template cannot make prompts: the file to add is named."""
    (broken / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r"no chat template: add its chat_template\.jinja"):
        load_processor(str(broken))


@pytest.mark.parametrize("file", ["processor_config.json", "tokenizer.json"])
def test_no_processor(broken, file):
    """Weights without the processor's files: what cannot be loaded is said, and what to copy."""
    (broken / file).unlink()
    words = r"has no processor that can be loaded \(.+\): copy the processor's files .*from the original model"
    with pytest.raises(ValueError, match=words):
        load_processor(str(broken))


def test_only_a_tokenizer(broken, monkeypatch):
    """A text model's tokenizer is no processor: it cannot see."""
    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda *_, **__: AutoTokenizer.from_pretrained(broken))
    with pytest.raises(ValueError, match=r"is only a .*: copy the processor's files"):
        load_processor(str(broken))


def test_other_kinds_of_models(tmp_path):
    """Qwen2-VL has a language model but neither tower nor projector of LLaVA's: refused by its class name."""
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {
        "vocab_size": 50,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
    }
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 1}
    Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"names the architectures .*Qwen2VLForConditionalGeneration"):
        load_model(str(tmp_path))


def test_device_is_what_torch_sees():
    """Where there is a GPU it is used, elsewhere the CPU."""
    assert pick_device() == ("cuda" if torch.cuda.is_available() else "cpu")
    assert next(load_model(str(DERM_TINY)).parameters()).device.type == pick_device()
