"""The gate: each way to break a checkpoint is refused in words that name what is wrong."""

import json
import shutil
from functools import wraps
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, LlavaForConditionalGeneration

from actors.checkpoint.pruning import prune_checkpoint
from actors.checkpoint.tensors import publish_names, write_tensors
from actors.gate import check as gate
from actors.probe import PROBE, read_probe, write_probe
from actors.specs import Change, GateError, ModelSpec
from actors.training.settings import Trained
from actors.training.trainer import Trainer
from tests.gating import UP, change, change_config, check, refused, swap
from tests.quantizing import SCALES, quantize
from tests.tiny import draw_conversations, plain_model, rename_tensors, save_tiny
from tests.training import training_settings

REMOVED = [1, 3]
CHECKS = {"tensors", "sums", "names", "processor", "modules", "linears", "logits", "cache", "vllm"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, and it without two layers, checked once: (source, pruned, what the gate found)."""
    folder = tmp_path_factory.mktemp("made")
    source = save_tiny(folder / "source", "clip-llama")
    prune_checkpoint(source, str(folder / "pruned"), REMOVED)
    return source, folder / "pruned", check(folder / "pruned", source, REMOVED, keep_probe=True)


@pytest.fixture
def copy(made, tmp_path) -> Path:
    return shutil.copytree(made[1], tmp_path / "copy")


def test_a_pruned_checkpoint_passes(made):
    """What is found is said in words and numbers; the probe is kept; a second check knows the sums and the probe."""
    source, pruned, found = made
    assert set(found) == CHECKS | {"kept", "layers"}
    assert found["kept"] == f"{len(load_file(pruned / 'model.safetensors'))} tensors are those of the model before"
    assert found["tensors"].endswith("finite tensors, 3 decoder layers")
    assert float(found["logits"].split()[0]) < 1e-5
    logits, dtype = read_probe(pruned)
    assert dtype == "float32" and logits.shape == (len(gate.load_processor(source).tokenizer),)
    again = check(pruned, sums=found["sums"])
    assert set(again) == CHECKS
    assert again["logits"] == "0 from what it gave when it was made (allowed: 0.02)"


def test_renumbering_forgotten(copy):
    def forget(tensors):
        old = {f".layers.{new}.": f".layers.{old}." for new, old in enumerate([0, 2, 4])}
        names = {
            n: next((n.replace(a, b) for a, b in old.items() if n.startswith("lang") and a in n), n) for n in tensors
        }
        return {names[n]: t for n, t in tensors.items()}

    change(copy, forget)
    refused(r"says 3 decoder layers.*does not fit is 'language_model\.model\.layers\.1'.*renumbered", copy)


@pytest.mark.parametrize(("count", "odd"), [(2, 2), (5, 3)])
def test_layer_count_wrong_in_the_config(copy, count, odd):
    change_config(copy, num_hidden_layers=count)
    refused(rf"says {count} decoder layers, the files hold 3: .*layers\.{odd}'", copy)


@pytest.mark.parametrize("removed", [[1], [1, 3, 4], None])
def test_another_number_of_layers_than_was_kept(made, removed):
    kept = 5 - len(removed or ())
    refused(f"says 3 decoder layers, but {kept} of the model before should be left", made[1], made[0], removed)


def test_layer_types_of_another_length(tmp_path):
    save_tiny(tmp_path, "clip-qwen2-mixed")
    change_config(tmp_path, layer_types=["full_attention"] * 4)
    refused(r"num_hidden_layers\S* \(5\) must be equal to the number of \S*layer_types\S* \(4\)", tmp_path)


def test_a_tensor_missing_in_one_layer(copy):
    change(copy, lambda tensors: {name: t for name, t in tensors.items() if name != f"{UP}.weight"})
    refused(f"'{UP}.weight' is missing; other decoder layers have it", copy)


def test_rounded_vision_tower(made, tmp_path):
    """bitsandbytes without the names that are to be left alone."""
    config = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["lm_head", "multi_modal_projector"])
    AutoModelForImageTextToText.from_pretrained(
        made[1], dtype=torch.float16, quantization_config=config
    ).save_pretrained(shutil.copytree(made[1], tmp_path / "copy"))
    publish_names(tmp_path / "copy")
    refused(r"'model\.vision_tower\.\S*' is a Linear4bit: only the decoder's linears may be rounded", tmp_path / "copy")


def test_config_that_forgets_the_rounding(made, tmp_path):
    quantize(str(made[1]), tmp_path / "q", "nf4")
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    refused(r"finds (unexpected|mismatched) weights, the first is '\S*layers\.0\.", tmp_path / "q")


def test_missing_shard(copy):
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    write_tensors(copy, iter(tensors.items()), 100_000)
    assert check(copy)["names"] == "as published by llava-hf"
    gone = sorted(copy.glob("model-00002-of-*.safetensors"))[0]
    gone.unlink()
    refused(rf"{gone.name}' is missing or damaged", copy)


def test_half_a_file(copy):
    content = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(content[: len(content) // 2])
    refused(r"model\.safetensors' is missing or damaged", copy)


def test_no_weights(copy):
    (copy / "model.safetensors").unlink()
    refused("holds no .safetensors file", copy)


def test_swapped_tensors_against_sums(made, copy):
    change(copy, swap)
    refused(
        rf"'{UP}\.weight' is not what was published \(it holds \S+layers\.2\.mlp\.up_proj", copy, sums=made[2]["sums"]
    )


def test_swapped_tensors_against_the_original(made, copy):
    change(copy, swap)
    (copy / PROBE).unlink()
    check(copy)
    refused(
        rf"'{UP}\.weight' is not '\S+layers\.2\.mlp\.up_proj\.weight' of the model before "
        r"\(it holds '\S+layers\.4\.mlp\.up_proj\.weight'\)",
        copy,
        made[0],
        REMOVED,
    )


@pytest.mark.parametrize("method", ["nf4", "int8", "hqq"])
def test_swapped_tensors_against_the_model_before_rounding(made, copy, method, tmp_path):
    """The logits of a rounded model may be far away, its linears may not: the first wrong one is named."""
    change(copy, swap)
    quantize(str(copy), tmp_path / "q", method)
    refused(f"'{UP}' does not compute with the weight before rounding", tmp_path / "q", made[1])
    check(tmp_path / "q", copy)


@pytest.fixture(scope="module")
def recovered(made, lesions, tmp_path_factory):
    """The pruned model, fine-tuned."""
    out = tmp_path_factory.mktemp("recovered")
    settings = training_settings(batch=2, micro_batch=2, learning_rate=1e-3, seed=0)
    list(Trainer(ModelSpec(str(made[1]))).train(draw_conversations(lesions, 4), settings, str(out)))
    return out


def test_a_recovered_checkpoint_passes(made, recovered):
    """All but its decoder's linears is the model before; they were trained, so as a pruned model it is refused."""
    found = check(recovered, made[1], change=Change.TRAINED, trained=Trained(("lora",)))
    assert set(found) == CHECKS | {"kept"} and found["logits"].startswith("0 from what it gave when it was made")
    assert (
        found["kept"]
        == f"{len(load_file(recovered / 'model.safetensors')) - 3 * 7} tensors are those of the model before"
    )
    refused(r"layers\.0\.\S+_proj\.weight' is not .* of the model before", recovered, made[1], [])
    refused(
        "says 3 decoder layers, but 5 of the model before should be left", recovered, made[0], change=Change.TRAINED
    )


@pytest.mark.parametrize(
    "name",
    [
        "vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight",
        "multi_modal_projector.linear_2.bias",
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.1.input_layernorm.weight",
        "language_model.model.norm.weight",
        "language_model.lm_head.weight",
    ],
)
def test_a_recovered_checkpoint_of_which_more_was_changed(made, recovered, tmp_path, name):
    """By less than its answers show: the tensor is named."""

    def nudge(tensors):
        tensors[name].view(-1)[0] += 1e-6

    change(shutil.copytree(recovered, tmp_path / "copy"), nudge)
    check(tmp_path / "copy")
    refused(
        f"'{name}' is not '{name}' of the model before",
        tmp_path / "copy",
        made[1],
        change=Change.TRAINED,
        trained=Trained(("lora",)),
    )


def test_new_and_missing_tensors_against_sums(made, copy):
    sums = dict(made[2]["sums"])
    gone = sums.pop(f"{UP}.weight")
    refused(f"'{UP}.weight' is new", copy, sums=sums)
    refused("'a.weight' is missing", copy, sums={**sums, f"{UP}.weight": gone, "a.weight": gone})


@pytest.mark.parametrize(("method", "value"), [(m, torch.nan) for m in SCALES] + [("rtn", torch.inf)])
def test_a_scale_that_is_no_number(made, tmp_path, lesions, method, value):
    quantize(str(made[1]), tmp_path / "q", method, draw_conversations(lesions, 2))
    name = f"{UP}.{SCALES[method]}"

    def spoil(tensors):
        tensors[name].view(-1)[0] = value

    change(tmp_path / "q", spoil)
    refused(f"'{name}' holds NaN or infinity", tmp_path / "q")


def test_name_not_published(copy):
    rename_tensors(copy, "five")
    refused(r"'(lm_head|model)\.\S+' is not a published llava-hf name", copy)


def test_missing_processor(copy):
    (copy / "processor_config.json").unlink()
    refused("cannot be loaded: .* has no processor that can be loaded|is only a", copy)


def test_missing_chat_template(copy):
    (copy / "chat_template.jinja").unlink()
    refused("has no chat template: add its chat_template.jinja", copy)


def test_extra_tensor(copy):
    change(copy, lambda tensors: tensors.update({"multi_modal_projector.linear_3.weight": torch.ones(2, 2)}))
    refused(r"finds unexpected weights, the first is '\S*multi_modal_projector\.linear_3\.weight'", copy)


def test_missing_tensor(copy):
    change(
        copy, lambda tensors: {name: t for name, t in tensors.items() if name != "multi_modal_projector.linear_2.bias"}
    )
    refused(r"finds missing weights, the first is '\S*multi_modal_projector\.linear_2\.bias'", copy)


def test_wrong_shape(copy):
    change(copy, lambda tensors: tensors.update({f"{UP}.weight": tensors[f"{UP}.weight"][:-8].contiguous()}))
    refused(
        r"mismatched weights, the first is '\S*layers\.1\.mlp\.up_proj\.weight' \(\[120, 64\] in the files, \[128",
        copy,
    )


def test_another_kind_of_model(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "architectures": ["LlavaNextForConditionalGeneration"]}))
    refused("names the architectures .*LlavaNext", copy)


def loaded_with(monkeypatch, edit) -> None:
    """Let the gate's model be changed by `edit` after loading."""
    plainly = gate.load_plainly

    def load(*arguments):
        model = plainly(*arguments)
        edit(model)
        return model

    monkeypatch.setattr(gate, "load_plainly", load)


def test_cache_that_mixes_layers(copy, monkeypatch):
    """Layers that store their keys and values in one another's place answer differently without the cache."""

    forward = LlavaForConditionalGeneration.forward

    @wraps(forward)
    def mixed(*arguments, **options):
        out = forward(*arguments, **options)
        if out.past_key_values is not None:
            out.past_key_values.layers.reverse()
        return out

    monkeypatch.setattr(LlavaForConditionalGeneration, "forward", mixed)
    refused("with the cache differs from generation without it at new token 1", copy)


def test_a_cache_that_turns_a_clear_choice_is_no_tie(made, monkeypatch):
    """The second of two tokens that are clearly apart is preferred with the cache: small beside a whole vocabulary."""
    processor = gate.load_processor(made[0])
    model, forward = plain_model(made[0]), LlavaForConditionalGeneration.forward
    inputs = gate.placed_probe(model, processor)
    options = {"max_new_tokens": 2, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    logits = model.generate(**inputs, **options).logits[1][0]
    (best, second), (_, other) = logits.topk(2)
    bump = float(best - second) * 1.01

    @wraps(forward)
    def bumped(*arguments, **options):
        out = forward(*arguments, **options)
        if out.logits.shape[1] == 1 and options["input_ids"].shape[1] == 1:
            out.logits[..., other] += bump
        return out

    tolerance = 2 * bump / float(logits.norm())
    assert bump > tolerance * float(best)
    assert "the same with and without it" in gate.check_cache(model, processor, tolerance)
    monkeypatch.setattr(LlavaForConditionalGeneration, "forward", bumped)
    with pytest.raises(GateError, match=r"new token 1: the logits are up to \S+ apart"):
        gate.check_cache(model, processor, tolerance)
    assert "a tie at new token 1" in gate.check_cache(model, processor, 1.01 * bump / float(best))


def test_linear_that_computes_with_other_numbers(made, tmp_path, monkeypatch):
    quantize(str(made[1]), tmp_path / "q", "rtn")
    check(tmp_path / "q", made[1])
    loaded_with(monkeypatch, lambda model: model.model.language_model.layers[1].mlp.up_proj.scales.mul_(1.1))
    refused(rf"'{UP}' does not compute with its stored numbers: it is off by 0\.1", tmp_path / "q")


def test_logits_that_are_no_numbers(copy, monkeypatch):
    loaded_with(monkeypatch, lambda model: model.lm_head.weight.data[3].fill_(torch.nan))
    refused("hold NaN or infinity", copy)


def test_kept_probe_differs(copy):
    write_probe(copy, read_probe(copy)[0] * 1.05, "float32")
    refused("differ from what it gave when it was made by 0.048", copy)


def test_no_checkpoint_at_all(tmp_path):
    refused("cannot be loaded", tmp_path)
