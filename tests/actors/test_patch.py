"""The patch without training: the map is the least squares one, and the checkpoint passes on what it promises."""

from pathlib import Path

import pytest
import torch

from actors.checkpoint.loading import load_processor
from actors.checkpoint.pruning import Surgeon
from actors.checkpoint.tensors import iterate_tensors
from actors.conversations import collate
from actors.maths.linear_map import LinearFit
from actors.specs import ModelSpec
from actors.training.patch import Patcher, removed_runs
from tests.tiny import draw_conversations, plain_model, save_tiny


def test_the_map_is_that_of_least_squares():
    random = torch.Generator().manual_seed(0)
    inputs, targets = (torch.randn(50, 4, dtype=torch.float64, generator=random) for _ in range(2))
    fit = LinearFit(4, torch.device("cpu"))
    for part in range(0, 50, 7):
        fit.add(inputs[part : part + 7], targets[part : part + 7])
    expected = torch.linalg.lstsq(inputs, targets).solution
    assert torch.allclose(fit.solve(0.0), expected, atol=1e-9)
    assert fit.error(expected) == pytest.approx(
        float(((inputs @ expected - targets) ** 2).sum() / ((inputs - targets) ** 2).sum())
    )
    eye = torch.eye(4, dtype=torch.float64)
    assert torch.allclose(fit.solve(1e9), eye, atol=1e-6) and fit.error(eye) == pytest.approx(1)


def test_fewer_tokens_than_channels_still_give_a_map():
    fit = LinearFit(8, torch.device("cpu"))
    fit.add(torch.randn(3, 8), torch.randn(3, 8))
    assert torch.isfinite(fit.solve(1e-3)).all()


@pytest.mark.parametrize(
    ("kept", "layers", "runs"),
    [
        ([0, 1, 4, 5], 6, {1: 3}),
        ([0, 2, 4], 7, {0: 1, 2: 3, 4: 6}),
        ([2, 3], 4, {}),  # what is removed before the first layer has none to stand in
        ([0, 1, 2], 3, {}),
    ],
)
def test_runs_by_hand(kept, layers, runs):
    assert removed_runs(kept, layers) == runs


@torch.inference_mode()
def passed_on(model, processor, conversations, layer: int) -> torch.Tensor:
    """What a layer gives for the conversations, one at a time: [T, D]."""
    rows = []
    for item in conversations:
        batch = collate(processor, [item])
        del batch["labels"]
        noted = []
        hook = model.model.language_model.layers[layer].register_forward_hook(lambda m, a, out, n=noted: n.append(out))
        model(**batch)
        hook.remove()
        rows.append((noted[0][0] if isinstance(noted[0], tuple) else noted[0]).flatten(0, -2))
    return torch.cat(rows).double()


@pytest.mark.parametrize("kind", ["clip-llama", "siglip-phi"])
def test_a_patched_checkpoint_passes_on_what_the_removed_layers_gave(kind, lesions, tmp_path):
    """The first patched layer's error is the promised share of the pruned one's, in plain transformers."""
    conversations = draw_conversations(lesions, 8)
    source = save_tiny(tmp_path / "a", kind, 6)
    Surgeon().prune(source, str(tmp_path / "pruned"), [1, 2, 4])
    pruned = ModelSpec(str(tmp_path / "pruned"))
    found = Patcher(ModelSpec(source)).patch(pruned, [0, 3, 5], conversations, str(tmp_path / "patched"))
    assert found["layers"] == [0, 1] and max(found["errors"]) < 0.9
    processor = load_processor(source)
    original = passed_on(plain_model(source), processor, conversations, 2)
    cut, mended = (
        passed_on(plain_model(str(tmp_path / name)), processor, conversations, 0) for name in ("pruned", "patched")
    )
    share = ((mended - original) ** 2).sum() / ((cut - original) ** 2).sum()
    assert float(share) == pytest.approx(found["errors"][0], rel=1e-3)
    before, after = (dict(iterate_tensors(tmp_path / name)) for name in ("pruned", "patched"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    last = ("down_proj.weight",) if kind == "clip-llama" else ("fc2.weight", "fc2.bias")
    assert changed == {f"language_model.model.layers.{n}.mlp.{name}" for n in (0, 1) for name in last}
    assert {tensor.dtype for tensor in after.values()} == {torch.float32} and Path(tmp_path / "patched").is_dir()
