"""AWQ: better than rounding to nearest, the same by both searches, and one layer at a time."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, LlavaForConditionalGeneration

from actors.checkpoint.loading import language_model, load_model, load_processor
from actors.checkpoint.tensors import iterate_tensors, stored_bytes, stored_dtype
from actors.derm_tiny.draw import write_tree
from actors.engine.replica import LlavaReplica
from actors.quantizers.awq import scaled_tensors, search_layer
from actors.quantizers.calibration import calibration_inputs, decoder_inputs
from actors.quantizers.storage import read_layers
from actors.quantizers.structure import ScalingGroup, scaling_groups
from actors.specs import ModelSpec
from tests.quantizing import check_modules, error, image_logits, model_logits, quantize, settings
from tests.tiny import (
    DERM_TINY,
    LAYERS,
    draw_conversations,
    draw_samples,
    processor_for,
    save_tiny,
    tiny_config,
)

SEARCHES = ("layerwise", "autoawq")


@pytest.fixture(scope="module")
def derm_rounded(tmp_path_factory, lesions):
    """derm-tiny, whose channels have planted outliers, by both searches of awq and by rtn."""
    pytest.importorskip("awq")
    root = tmp_path_factory.mktemp("rounded")
    facts = {
        search: quantize(str(DERM_TINY), root / search, "awq", draw_conversations(lesions, 16), awq_search=search)
        for search in SEARCHES
    }
    quantize(str(DERM_TINY), root / "rtn", "rtn")
    write_tree(root / "other", per_class=1, seed=77)
    return root, facts


@pytest.mark.parametrize("search", SEARCHES)
def test_awq_beats_rtn_on_outliers(derm_rounded, search):
    """On images that the calibration has not seen, awq's logit error is less than half of rtn's."""
    root, facts = derm_rounded
    assert facts[search]["linears"] == 70 and facts[search]["calibration_tokens"] > 100
    exact = image_logits(str(DERM_TINY), root / "other", 8)
    awq, rtn = (error(image_logits(str(root / folder), root / "other", 8), exact) for folder in (search, "rtn"))
    assert 0.005 < awq < 0.5 * rtn


@torch.inference_mode()
def found_alphas(layer, own, means: dict[ScalingGroup, torch.Tensor]) -> dict[str, float]:
    """Recover alpha of every scale of a scaled and rounded layer, by what it was divided out of.

    Of log scale = alpha log mean |X| + c, by least squares. The scale is the ratio of what precedes the linears before
    and after: of a norm's weights, or of a linear's rows, each by least squares, for they are rounded.
    """
    scales: dict[str, torch.Tensor] = {}
    alphas = {}
    for group, mean in means.items():
        before, after = (each.get_submodule(group.before) for each in (layer, own))
        if isinstance(before, nn.Linear):
            feeds = next(other.before for other in means if group.before in other.linears)
            weight = after(torch.eye(before.in_features)).T / scales[feeds]
            scale = before.weight.square().sum(1) / (before.weight * weight).sum(1)
        else:
            scale = before.weight / after.weight
        scales[group.before] = scale
        x, y = (values.log() - values.log().mean() for values in (mean, scale))
        alphas[group.before] = float((x * y).sum() / (x * x).sum())
        assert (y - alphas[group.before] * x).abs().max() < (0.15 if isinstance(before, nn.Linear) else 2e-2)
    return alphas


@torch.inference_mode()
def compared(folders, lesions) -> Iterator[tuple[float, list[tuple[float, float]]]]:
    """Yield of each layer of derm-tiny, for two checkpoints of it: the ratio of output errors, the pairs of alphas."""
    model = load_model(str(DERM_TINY))
    rounded = [language_model(load_model(str(folder))).layers for folder in folders]
    rows = calibration_inputs(model, load_processor(str(DERM_TINY)), draw_conversations(lesions, 16))
    hidden, kwargs = decoder_inputs(model, rows, 10)
    for number, layer in enumerate(language_model(model).layers):
        means: dict[ScalingGroup, torch.Tensor] = {}
        for group in scaling_groups(layer):
            layer.get_submodule(group.linears[0]).register_forward_pre_hook(
                lambda _, given, group=group, means=means: means.update({group: given[0].abs().mean((0, 1))})
            )
        output = layer(hidden, **kwargs[number])
        ours, theirs = (own[number] for own in rounded)
        own, other = (float((each(hidden, **kwargs[number]) - output).norm()) for each in (ours, theirs))
        hidden = output
        means = {group: means[group] for group in scaling_groups(layer)}
        one, two = (found_alphas(layer, each, means) for each in (ours, theirs))
        yield own / other, [(one[before], two[before]) for before in one]


def test_both_searches_agree(derm_rounded, lesions):
    """The same scales within a step of the grid, most of them equal; each layer's output error within 2 %, but one's.

    What remains is the clipping: with limits symmetric about zero the zero point is 7.5, and which way it is rounded
    depends on the scale's float16 digits, which our search sees and autoawq's does not. With it layer 2's is .955 of
    autoawq's, at the same scales; the others' are .982 to .994. Ours must not be worse.
    """
    root, _ = derm_rounded
    found = list(compared([root / search for search in SEARCHES], lesions))
    ratios = [ratio for ratio, _ in found]
    pairs = [pair for _, alphas in found for pair in alphas]
    differences = [abs(one - other) for one, other in pairs]
    assert len(differences) == 40 and max(differences) < 0.05 + 0.005
    assert sum(difference < 0.006 for difference in differences) >= 36 and max(one for one, _ in pairs) > 0.5
    assert ratios.pop(2) == pytest.approx(0.96, abs=0.02)
    assert len(ratios) == 9 and all(0.98 < ratio < 1.02 for ratio in ratios), ratios


@pytest.mark.slow
def test_without_clipping_equal_scales_have_equal_errors(derm_rounded, lesions, tmp_path):
    """In nine layers of ten, layer 2 among them; in layer 5 one scale is a step apart, and the error .968 of autoawq's.

    Equal is 1 in 1000.
    """
    conversations = draw_conversations(lesions, 16)
    for search in SEARCHES:
        quantize(str(DERM_TINY), tmp_path / search, "awq", conversations, awq_search=search, clip=False)
    found = list(compared([tmp_path / search for search in SEARCHES], lesions))
    same = [all(abs(one - other) < 0.006 for one, other in alphas) for _, alphas in found]
    ratios = [ratio for ratio, _ in found]
    assert len(same) == 10 and sum(same) >= 9 and same[2], same
    allowed = [0.001 if equal else 0.05 for equal in same]
    assert all(-limit < ratio - 1 < 0.001 for ratio, limit in zip(ratios, allowed, strict=True)), ratios


@pytest.mark.parametrize("search", SEARCHES)
def test_awq_checkpoint_reloads(derm_rounded, lesions, search):
    """The same modules and the same size as rtn's; its answers are nearly the float model's."""
    root, _ = derm_rounded
    check_modules(str(root / search), str(DERM_TINY), "awq")
    assert stored_bytes(str(root / search)) == stored_bytes(str(root / "rtn"))
    assert stored_dtype(str(root / search)) == torch.float16
    samples = draw_samples(lesions, 8, ["What is the name of this disease?"])
    float_rows = LlavaReplica(ModelSpec(str(DERM_TINY))).answers(samples, [()], 12)
    awq_rows = LlavaReplica(ModelSpec(str(root / search))).answers(samples, [()], 12)
    assert sum(a["answer"] == b["answer"] for a, b in zip(awq_rows, float_rows, strict=True)) >= 6


def save_biased(folder: Path) -> str:
    """Save a Llama whose q, k, v, o, gate, up and down all have biases."""
    config = tiny_config("clip-llama")
    config.text_config.attention_bias = config.text_config.mlp_bias = True
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter) / parameter.shape[-1] ** 0.5 * parameter.dim())
    model.save_pretrained(folder)
    processor_for("clip").save_pretrained(folder)
    return str(folder)


# The biases that are scaled. Qwen2's v has one, but grouped queries, so that v -> o is not scaled.
DIVIDED: dict[str, tuple[str, ...]] = {
    "clip-llama": (),
    "clip-qwen2": (),
    "clip-qwen2-mixed": (),
    "biased": ("up_proj", "v_proj"),
    "clip-phi": ("input_layernorm", "v_proj"),
}


@torch.no_grad()
@pytest.mark.parametrize("name", DIVIDED)
def test_scaling_alone_changes_nothing(name, lesions, tmp_path):
    """Without clipping and rounding the scaled model, biases included, computes what the original computes.

    And what passed through the layers during the search is what passes through them inside the model.
    """
    source = save_biased(tmp_path) if name == "biased" else save_tiny(tmp_path, name)
    model, processor = load_model(source), load_processor(source)
    exact = model_logits(model, processor, lesions)
    rows = calibration_inputs(model, processor, draw_conversations(lesions, 6))
    hidden, kwargs = decoder_inputs(model, rows, LAYERS)
    config = AutoConfig.from_pretrained(source)
    tensors = dict(scaled_tensors(Path(source), config, settings("awq", clip=False), hidden, kwargs))
    last = model.model(**rows, use_cache=False).last_hidden_state
    decoder = language_model(model)
    norm = decoder.final_layernorm if name == "clip-phi" else decoder.norm
    assert error(norm(hidden), last) < 1e-5
    stored = dict(iterate_tensors(Path(source)))
    assert tensors.keys() == stored.keys()
    changed = [n for n, tensor in tensors.items() if not torch.allclose(tensor, stored[n], rtol=1e-3)]
    assert sum("q_proj.weight" in n for n in changed) >= 3  # alpha may be 0 in some layer
    assert {n.split(".")[-2] for n in changed if n.endswith(".bias")} == set(DIVIDED[name])
    for layer, parts in zip(decoder.layers, read_layers(Path(source), LAYERS), strict=True):
        layer.load_state_dict({part: tensors[full] for part, (full, _) in parts.items()})
    assert error(model_logits(model, processor, lesions), exact) < 1e-4


@pytest.mark.parametrize("name", ["clip-llama", "clip-mistral-window"])
def test_parts_of_the_calibration_add_up(name, lesions, tmp_path, monkeypatch):
    """One row at a time or all at once: the same output, and the same scaled and clipped layer."""
    source = save_tiny(tmp_path, name, layers=1)
    processor = load_processor(source)
    results = []
    for tokens in (1, 10**6):
        monkeypatch.setattr("actors.quantizers.calibration.TOKENS", tokens)
        model = load_model(source)
        rows = calibration_inputs(model, processor, draw_conversations(lesions, 6))
        hidden, kwargs = decoder_inputs(model, rows, 1)
        layer = language_model(model).layers[0]
        with torch.no_grad():
            expected = layer(hidden, **kwargs[0])
        search_layer(layer, hidden, kwargs[0], settings("awq"))
        assert (hidden - expected).abs().max() < 1e-4
        results.append([parameter.detach() for parameter in layer.parameters()])
    assert rows["input_ids"].shape[0] == 3
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*results, strict=True))


def test_one_layer_in_memory(lesions, tmp_path, monkeypatch):
    """While a layer is searched, the weights of all others are on the meta device or not read yet."""
    from actors.quantizers import awq

    source = save_tiny(tmp_path / "a", "clip-llama")
    made, filled = [], []
    empty, search = awq.empty_decoder, awq.search_layer

    def noted_decoder(config):
        made.append(empty(config))
        return made[-1]

    def noted_search(layer, *rest):
        filled.append([not next(other.parameters()).is_meta for other in made[0].layers])
        search(layer, *rest)

    monkeypatch.setattr(awq, "empty_decoder", noted_decoder)
    monkeypatch.setattr(awq, "search_layer", noted_search)
    quantize(source, tmp_path / "b", "awq", draw_conversations(lesions, 4))
    assert filled == [[i == number for i in range(LAYERS)] for number in range(LAYERS)]
    assert all(parameter.is_meta for parameter in made[0].parameters())


def test_autoawq_on_grouped_queries_and_windows(lesions, tmp_path):
    """Grouped-query attention has no v -> o scaling; a random Mistral with a window still gets a usable checkpoint."""
    pytest.importorskip("awq")
    source, out = save_tiny(tmp_path / "a", "clip-mistral-window", layers=2), tmp_path / "b"
    conversations = draw_conversations(lesions, 6)
    facts = quantize(source, out, "awq", conversations, clip=False, awq_search="autoawq")
    assert facts["linears"] == 14
    check_modules(str(out), source, "awq")
    assert 0.02 < error(image_logits(str(out), lesions), image_logits(source, lesions)) < 0.6


def test_autoawq_and_layers_of_several_kinds(lesions, tmp_path):
    """autoawq would give every layer the first one's mask: it is refused, and the built-in search named."""
    pytest.importorskip("awq")
    source = save_tiny(tmp_path / "a", "clip-qwen2-mixed")
    with pytest.raises(ValueError, match=r"supports one attention mask.*awq_search to layerwise"):
        quantize(source, tmp_path / "b", "awq", draw_conversations(lesions, 6), clip=False, awq_search="autoawq")


@pytest.mark.parametrize("search", SEARCHES)
def test_awq_needs_calibration(tiny_path, tmp_path, search):
    """No training conversations: the message says where they come from."""
    if search == "autoawq":
        pytest.importorskip("awq")
    with pytest.raises(ValueError, match="needs calibration conversations from the training split"):
        quantize(tiny_path, tmp_path, "awq", awq_search=search)


def test_awq_without_autoawq(tiny_path, lesions, tmp_path, monkeypatch):
    """The remedies are one pip command and the built-in search, which then works."""
    monkeypatch.setitem(sys.modules, "awq.quantize.quantizer", None)
    monkeypatch.setitem(sys.modules, "awq", None)
    with pytest.raises(ValueError, match=r"pip install --no-deps autoawq==0\.2\.9 .*--quantize\.awq_search layerwise"):
        quantize(tiny_path, tmp_path / "a", "awq", draw_conversations(lesions, 2), awq_search="autoawq")
    assert quantize(tiny_path, tmp_path / "b", "awq", draw_conversations(lesions, 2))["linears"] == 35


def test_missing_layers(lesions, tmp_path):
    """A checkpoint with fewer layers than its config says is refused before the search."""
    source = save_tiny(tmp_path / "a", "clip-llama")
    config = AutoConfig.from_pretrained(source)
    config.text_config.num_hidden_layers = 6
    config.save_pretrained(source)
    with pytest.raises(ValueError, match=r"holds 5 decoder layers but its config\.json says 6"):
        quantize(source, tmp_path / "b", "awq", draw_conversations(lesions, 2))
