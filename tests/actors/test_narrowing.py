"""Width pruning: scores against naive sums, and checkpoints against the whole model with the same groups masked."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from actors.checkpoint.config import read_config
from actors.checkpoint.loading import load_model, load_processor
from actors.checkpoint.tensors import iterate_tensors, published_name
from actors.conversations import collate
from actors.criteria import WIDTH_CRITERIA
from actors.estimate import Setting, architecture, estimate
from actors.gate.check import Gate
from actors.narrowing.groups import FILE, Heads, KeptGroups, group_sums, layer_shape, mask_layer, places, removed_groups
from actors.narrowing.narrower import Narrower, choose_groups, narrow_config
from actors.narrowing.scores import CRITERIA, score_groups
from actors.specs import Change, GateError, ModelSpec
from tests.tiny import ARCHITECTURES, draw_conversations, plain_model, save_tiny, tiny_config


@pytest.fixture(scope="module")
def conversations(lesions):
    return draw_conversations(lesions, 4)


def narrow(source: str, conversations, out, width=0.5, multiple=16, criterion="taylor", seed=0) -> dict:
    return Narrower(ModelSpec(source)).narrow(conversations, width, multiple, criterion, seed, str(out))


def test_groups_by_hand():
    """Two key/value heads of one channel, two query heads each, three MLP channels."""
    text = tiny_config("clip-llama").text_config
    text.num_attention_heads, text.num_key_value_heads, text.head_dim = 4, 2, 1

    def pair(rows, columns):
        return torch.tensor(rows, dtype=torch.float64), torch.tensor(columns, dtype=torch.float64)

    linears = {
        "self_attn.q_proj": pair([1, 2, 3, 4], [9, 9]),
        "self_attn.k_proj": pair([10, 20], [9, 9]),
        "self_attn.v_proj": pair([100, 200], [9, 9]),
        "self_attn.o_proj": pair([9, 9], [1000, 2000, 3000, 4000]),
        "mlp.gate_proj": pair([1, 2, 3], [9, 9]),
        "mlp.up_proj": pair([10, 20, 30], [9, 9]),
        "mlp.down_proj": pair([9, 9], [100, 200, 300]),
    }
    heads, channels = group_sums(linears, text)
    assert heads.tolist() == [1 + 2 + 10 + 100 + 3000, 3 + 4 + 20 + 200 + 7000]
    assert channels.tolist() == [111, 222, 333]
    kept = choose_groups([(heads, channels), (-heads, torch.tensor([5.0, 5.0, 5.0]))], 1, 2)
    assert kept.heads.tolist() == [[1], [0]] and kept.channels.tolist() == [[1, 2], [0, 1]]
    assert places([0, 2], 2).tolist() == [0, 1, 4, 5] and removed_groups([1, 3], 4) == [0, 2]


def naive_scores(name: str, path: str, conversations) -> list[tuple[list[float], list[float]]]:
    """Group by group, from whole gradients and inputs in float64."""
    model, processor = plain_model(path).double(), load_processor(path)
    text = model.config.text_config
    shape, heads = layer_shape(text), Heads.of(text)
    layers = model.model.language_model.layers
    values = {parameter: torch.zeros_like(parameter) for parameter in model.parameters()}
    squares = {}
    for item in conversations:
        noted = {}
        hooks = [
            layer.get_submodule(linear).register_forward_hook(
                lambda m, args, out, key=(number, linear), n=noted: n.update({key: args[0][0].detach()})
            )
            for number, layer in enumerate(layers)
            for linear in (shape.out, shape.down)
        ]
        batch = collate(processor, [item])
        batch["pixel_values"] = batch["pixel_values"].double()
        model.zero_grad()
        model(**batch).loss.backward()
        for parameter in values:
            if parameter.grad is not None:
                values[parameter] += (parameter * parameter.grad).abs().detach()
        for key, rows in noted.items():
            squares[key] = squares.get(key, 0) + (rows**2).sum(0)
        for hook in hooks:
            hook.remove()
    if name == "magnitude":
        values = {parameter: parameter.detach().abs() for parameter in values}
    found = []
    for number, layer in enumerate(layers):
        linears = {n: m for n, m in layer.named_modules() if isinstance(m, torch.nn.Linear)}

        def score(linear, rows=None, columns=None, linears=linears, number=number):
            module = linears[linear]
            if name == "activation":
                if rows is not None:
                    return 0.0
                return float((module.weight.detach().abs() * squares[number, linear].sqrt())[:, columns].sum())
            if columns is not None:
                return float(values[module.weight][:, columns].sum())
            bias = float(values[module.bias][rows].sum()) if module.bias is not None else 0.0
            return float(values[module.weight][rows].sum()) + bias

        size, wide = heads.size, heads.size * heads.queries
        groups = [
            score("self_attn.q_proj", rows=slice(g * wide, (g + 1) * wide))
            + score("self_attn.k_proj", rows=slice(g * size, (g + 1) * size))
            + score("self_attn.v_proj", rows=slice(g * size, (g + 1) * size))
            + score(shape.out, columns=slice(g * wide, (g + 1) * wide))
            for g in range(heads.groups)
        ]
        channels = [
            score(shape.down, columns=c) + sum(score(read, rows=c) for read in shape.reads)
            for c in range(text.intermediate_size)
        ]
        found.append((groups, channels))
    return found


@pytest.mark.parametrize("kind", ["clip-qwen2", "siglip-phi"])
@pytest.mark.parametrize("name", ["magnitude", "taylor", "activation"])
def test_scores_are_the_naive_sums(name, kind, conversations, tmp_path):
    source = save_tiny(tmp_path / "a", kind, 2)
    model = load_model(source)
    found, _ = score_groups(name, model, load_processor(source), conversations, 0)
    for (heads, channels), (expected_heads, expected_channels) in zip(
        found, naive_scores(name, source, conversations), strict=True
    ):
        assert heads.tolist() == pytest.approx(expected_heads, rel=2e-4)
        assert channels.tolist() == pytest.approx(expected_channels, rel=2e-3, abs=1e-9)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_narrow_checkpoint_is_the_masked_model(kind, conversations, tmp_path):
    """In plain transformers and float32; biases carry the mean of what is gone, where there are any."""
    source = save_tiny(tmp_path / "a", kind, 3)
    facts = narrow(source, conversations, tmp_path / "b")
    kept, narrowed, masked = KeptGroups.read(tmp_path / "b"), plain_model(str(tmp_path / "b")), plain_model(source)
    text = narrowed.config.text_config
    before = masked.config.text_config
    assert (text.num_key_value_heads, text.intermediate_size) == (facts["head_groups"], facts["channels"])
    assert facts["channels"] == 64 == before.intermediate_size // 2 and text.hidden_size == before.hidden_size
    assert 2 * text.num_attention_heads <= before.num_attention_heads + 1
    written = {published_name(name): tensor for name, tensor in iterate_tensors(tmp_path / "b")}
    for number, layer in enumerate(masked.model.language_model.layers):
        mask_layer(layer, kept.heads[number], kept.channels[number], before)
        for name, parameter in layer.named_parameters():
            if facts["compensated"] and name in (f"{layer_shape(before).out}.bias", f"{layer_shape(before).down}.bias"):
                now = written[f"language_model.model.layers.{number}.{name}"]
                assert not torch.equal(now, parameter)
                parameter.data.copy_(now)
    assert facts["compensated"] == kind.endswith("phi")
    batch = collate(load_processor(source), conversations[:2])
    del batch["labels"]
    with torch.inference_mode():
        expected, found, whole = (model(**batch).logits for model in (masked, narrowed, plain_model(source)))
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert (found - whole).norm() > 1e-2 * whole.norm()


def test_compensation_keeps_the_mean(conversations, tmp_path):
    """Over the calibration tokens a first layer's MLP gives the same on average as before."""
    source = save_tiny(tmp_path / "a", "siglip-phi", 1)
    narrow(source, conversations, tmp_path / "b", criterion="magnitude")
    processor, means = load_processor(source), []
    for path in (source, str(tmp_path / "b")):
        model, noted = plain_model(path), []
        model.model.language_model.layers[0].mlp.register_forward_hook(lambda m, a, out, n=noted: n.append(out[0]))
        for item in conversations:
            batch = collate(processor, [item])
            del batch["labels"]
            with torch.inference_mode():
                model(**batch)
        means.append(torch.cat(noted).mean(0))
    assert torch.allclose(means[0], means[1], atol=1e-5)
    assert not torch.allclose(means[0], torch.zeros_like(means[0]), atol=1e-3)


def test_widths_that_round(conversations, tmp_path):
    """Whole head groups and multiples of channels, and one of each at least; the estimate counts the same weights."""
    config = tiny_config("clip-llama")
    text = narrow_config(config, 0.01, 64).text_config
    assert (text.num_key_value_heads, text.intermediate_size) == (1, 64)
    assert narrow_config(config, 1.0, 64).text_config.intermediate_size == 128
    source = save_tiny(tmp_path / "a", "clip-llama", 2)
    narrow(source, conversations, tmp_path / "b", width=0.75, multiple=32, criterion="random")
    config = read_config(tmp_path / "b")
    assert (config.text_config.num_attention_heads, config.text_config.intermediate_size) == (3, 96)
    counted = sum(tensor.numel() for _, tensor in iterate_tensors(tmp_path / "b"))
    setting = Setting((16, 16), "none", 64, 1, 1, None, 8, 2, 1)
    assert estimate(architecture(config), setting)["params"] == counted


def test_random_is_drawn_by_the_seed(conversations, tmp_path):
    source = save_tiny(tmp_path / "a", "clip-llama", 2)
    kept = []
    for seed in (0, 0, 1):
        narrow(source, conversations, tmp_path / "b", criterion="random", seed=seed)
        kept.append(KeptGroups.read(tmp_path / "b").channels)
        shutil.rmtree(tmp_path / "b")
    assert np.array_equal(kept[0], kept[1]) and not np.array_equal(kept[0], kept[2])
    assert list(CRITERIA) == list(WIDTH_CRITERIA)


def test_other_layers_are_refused():
    text = tiny_config("clip-llama").text_config
    text.model_type = "mamba"
    with pytest.raises(ValueError, match=r"layers of 'mamba' cannot be narrowed, only those of llama, mistral"):
        layer_shape(text)


def test_a_llama_whose_heads_do_not_divide_its_width(conversations, tmp_path):
    """transformers refuses it; as a Mistral without a window it computes the same."""
    source = save_tiny(tmp_path / "a", "clip-llama", 2)
    narrow(source, conversations, tmp_path / "b", width=0.75, multiple=32)
    narrowed, masked = plain_model(str(tmp_path / "b")), plain_model(source)
    text, kept = narrowed.config.text_config, KeptGroups.read(tmp_path / "b")
    assert (text.model_type, text.num_attention_heads, text.head_dim, text.sliding_window) == ("mistral", 3, 16, None)
    for number, layer in enumerate(masked.model.language_model.layers):
        mask_layer(layer, kept.heads[number], kept.channels[number], masked.config.text_config)
    batch = collate(load_processor(source), conversations[:2])
    del batch["labels"]
    with torch.inference_mode():
        expected, found = masked(**batch).logits, narrowed(**batch).logits
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    config = tiny_config("clip-llama")
    config.text_config.attention_bias = True
    with pytest.raises(ValueError, match=r"prune\.width leaves 3 heads, which do not divide the width 64"):
        narrow_config(config, 0.75, 32)


@pytest.mark.parametrize("kind", ["clip-llama", "clip-qwen2", "clip-phi"])
def test_the_gate_of_a_narrow_checkpoint(kind, conversations, tmp_path):
    """It passes; with two channels of one linear swapped, without its record or with another one's it is refused."""
    source = save_tiny(tmp_path / "a", kind, 2)
    narrow(source, conversations, tmp_path / "b")
    parent, change = ModelSpec(source), Change.NARROWED
    found = Gate().check(ModelSpec(str(tmp_path / "b")), parent, change, keep_probe=True)
    assert found["kept"].startswith("every tensor is the part") and "masked" in found["logits"]
    reads = layer_shape(tiny_config(kind).text_config).reads[0]
    spoils = [
        (lambda folder: swap_rows(folder, f"{reads}.weight"), "is not the part of"),
        (lambda folder: (folder / FILE).unlink(), "cannot be loaded"),
        (lambda folder: (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-40]), "cannot be loaded"),
        (lambda folder: other_channel(folder, 0), "is not the part of"),
        (lambda folder: other_channel(folder, 9999), "does not say for every layer which of its 128 groups"),
    ]
    if kind == "clip-phi":
        spoils.append((lambda folder: swap_rows(folder, "mlp.fc2.bias"), "is not the part of"))
    for spoil, message in spoils:
        folder = shutil.copytree(tmp_path / "b", tmp_path / "c")
        spoil(folder)
        with pytest.raises(GateError, match=message):
            Gate().check(ModelSpec(str(folder)), parent, change)
        shutil.rmtree(folder)


def swap_rows(folder, name: str) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = f"language_model.model.layers.1.{name}"
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})


def other_channel(folder, number: int) -> None:
    """Say that the first layer's last channel was another one: a number that is missing (0: the largest), or this."""
    kept = KeptGroups.read(folder)
    kept.channels[0, -1] = number or removed_groups(kept.channels[0], 128)[-1]
    KeptGroups(kept.heads, np.sort(kept.channels, 1), kept.biases).write(folder)
