"""The gate: sound checkpoints pass, whatever the architecture, the names in its source, the method and the bits."""

from pathlib import Path

import numpy as np
import pytest
import torch

from actors.checkpoint.pruning import prune_checkpoint
from actors.gate.check import ROUNDED, Gate
from actors.probe import PROBE, read_probe
from actors.quantizers.table import METHODS, bits_of, for_bits
from actors.specs import Change, ModelSpec
from actors.training.settings import Trained
from actors.training.trainer import Trainer
from tests.gating import check
from tests.quantizing import NOT_UNPACKED, PACKED, quantize
from tests.tiny import ARCHITECTURES, DERM_TINY, draw_conversations, rename_tensors, save_tiny
from tests.training import training_settings

REMOVED = [1, 3]
SHORT = ("clip-llama", "siglip-phi", "clip-mistral-window", "clip-qwen2-mixed")


@pytest.mark.parametrize("style", ["published", "five"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_pruned_models_of_every_architecture(name, style, tmp_path):
    """The published names are written, whatever the source's were; logits are those of the layers switched off."""
    source = save_tiny(tmp_path / "a", name)
    rename_tensors(tmp_path / "a", style)
    prune_checkpoint(source, str(tmp_path / "b"), REMOVED)
    found = check(tmp_path / "b", source, REMOVED)
    assert float(found["logits"].split()[0]) < 1e-5 and "same with and without" in found["cache"]


def rounded(name: str, method: str, work: Path, lesions: Path, parent: str) -> None:
    """Quantize `parent` and check the result."""
    if method in ("hqq", "autoawq"):
        pytest.importorskip(method.removeprefix("auto"))
    out = work / f"{Path(parent).name}-{method}"
    # autoawq clips in blocks of 64 outputs; with grouped queries v_proj has 32 here.
    changes = {"awq_search": "autoawq", "clip": "llama" in name} if method == "autoawq" else {}
    method = method.removeprefix("auto")
    quantize(parent, out, method, draw_conversations(lesions, 4), **changes)
    found = check(out, parent, keep_probe=True)
    assert PACKED[method] in found["modules"] and "before rounding" in found["logits"]
    assert ("before rounding" if method in NOT_UNPACKED else "stored numbers") in found["linears"]
    if name == "clip-llama":
        check(out, sums=found["sums"])


AUTOAWQ = ("clip-llama", "siglip-llama", "clip-llama-tied", "clip-mistral-window", "clip-qwen2")
QUICK = [(name, method) for name in SHORT for method in PACKED if name == "clip-llama" or method == "awq"]
SLOW = [(name, method) for name in SHORT for method in PACKED if (name, method) not in QUICK]
SLOW += [(name, "autoawq") for name in AUTOAWQ]
PRUNED_AND_ROUNDED = [*QUICK, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in SLOW)]


@pytest.mark.parametrize(("name", "method"), PRUNED_AND_ROUNDED)
def test_a_pruned_and_rounded_checkpoint_passes(name, method, lesions, tmp_path):
    source = save_tiny(tmp_path / "a", name)
    prune_checkpoint(source, str(tmp_path / "b"), REMOVED)
    rounded(name, method, tmp_path, lesions, str(tmp_path / "b"))


def test_a_recovered_bfloat16_checkpoint_passes_in_float32(lesions, tmp_path):
    """The trainer's probe is computed in the stored type, whatever the type that it is checked in."""
    prune_checkpoint(save_tiny(tmp_path / "a", "clip-qwen2", dtype=torch.bfloat16), str(tmp_path / "b"), [1])
    settings = training_settings(batch=2, micro_batch=2, learning_rate=1e-3, seed=0)
    trainer = Trainer(ModelSpec(str(tmp_path / "b"), "float32"))
    list(trainer.train(draw_conversations(lesions, 4), settings, str(tmp_path / "c")))
    assert read_probe(tmp_path / "c")[1] == "bfloat16"
    found = check(tmp_path / "c", keep_probe=True)
    assert float(found["logits"].split()[0]) > 0.02 and "(allowed: 0.1)" in found["logits"]


def test_a_probe_kept_in_bfloat16_passes_in_float32(tmp_path):
    """As jobs.verify tries it; also where the folder does not say in which type its probe was computed."""
    source = save_tiny(tmp_path / "a", "clip-llama", layers=16, dtype=torch.bfloat16)
    prune_checkpoint(source, str(tmp_path / "b"), [1])
    Gate().check(
        ModelSpec(str(tmp_path / "b"), "bfloat16"), ModelSpec(source, "bfloat16"), Change.PRUNED, [1], keep_probe=True
    )
    logits, dtype = read_probe(tmp_path / "b")
    assert dtype == "bfloat16" and float(check(tmp_path / "b")["logits"].split()[0]) > 0.02
    np.save(tmp_path / "b" / PROBE, logits)
    assert read_probe(tmp_path / "b")[1] is None and "(allowed: 0.1)" in check(tmp_path / "b")["logits"]


@pytest.mark.slow
@pytest.mark.parametrize("method", PACKED)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_rounded_checkpoint_passes(name, method, lesions, tmp_path):
    """The model itself, and a fine-tuned pruned one."""
    source = save_tiny(tmp_path / "a", name)
    rounded(name, method, tmp_path, lesions, source)
    prune_checkpoint(source, str(tmp_path / "b"), REMOVED)
    settings = training_settings(batch=2, micro_batch=2, learning_rate=1e-3, seed=0)
    steps = Trainer(ModelSpec(str(tmp_path / "b"))).train(draw_conversations(lesions, 4), settings, str(tmp_path / "c"))
    assert len(list(steps)) == 2
    found = check(tmp_path / "c", tmp_path / "b", change=Change.TRAINED, trained=Trained(("lora",)))
    assert float(found["logits"].split()[0]) < 1e-5
    rounded(name, method, tmp_path, lesions, str(tmp_path / "c"))


OTHER_BITS = [
    (name, bits)
    for name, method in METHODS.items()
    for bits in method.bits
    if name not in PACKED or bits != bits_of(name, 4)
]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "bits"), OTHER_BITS)
def test_other_bits_pass(method, bits, lesions, tmp_path):
    """derm-tiny, whose outliers make 2 and 3 bits answer anything: the linears alone tell it is sound."""
    quantize(str(DERM_TINY), tmp_path / "a", method, draw_conversations(lesions, 4), bits=bits)
    found = check(tmp_path / "a", DERM_TINY)
    assert ("(simulated)" in found["modules"]) == METHODS[method].simulated(bits)
    assert ("allowed: any" in found["logits"]) == (for_bits(ROUNDED, bits) == float("inf"))
    assert ("from the model before on the same inputs" in found["layers"]) and (
        (found["linears"] == "nothing to compare with") == METHODS[method].rescales
    )
