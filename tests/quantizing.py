"""What the tests of the quantizers share: settings, logits, classes of modules, and workers that fail."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from actors.checkpoint.loading import load_model, load_processor
from actors.conversations import collate
from actors.quantizers import awq
from actors.quantizers.quantizer import Quantizer
from actors.quantizers.table import COMPRESSED_TENSORS, GEMM, METHODS, bits_of
from actors.specs import ModelSpec, QuantizeSettings
from actors.training.parts import language_linears
from tests.tiny import draw_conversations

PACKED = {  # the class of a loaded linear, of every method that packs its default bits
    **dict.fromkeys(("rtn", "awq"), "AwqTorchLinear"),
    **{"nf4": "Linear4bit", "int8": "Linear8bitLt", "hqq": "HqqLinear"},
}
SCALES = {  # the tensor that holds a linear's scales
    **dict.fromkeys(("rtn", "awq"), "scales"),
    **{"nf4": "weight.absmax", "int8": "SCB", "hqq": "scale"},
}
OPTIONAL = {"hqq": "hqq"}  # the package without which a method's tests are skipped
# Those whose packed numbers the gate does not unpack itself: it compares them with the weights before rounding.
NOT_UNPACKED = [method for method in PACKED if METHODS[method].layout not in (GEMM, COMPRESSED_TENSORS)]


def settings(method: str, **changes) -> QuantizeSettings:
    made = QuantizeSettings(method, bits_of(method, 4), group_size=64, clip=True, awq_search="layerwise")
    return replace(made, **changes)


def quantize(path: str, out: Path, method: str, calibration=(), **changes) -> dict:
    if method in OPTIONAL:
        pytest.importorskip(OPTIONAL[method])
    out.mkdir(exist_ok=True)
    return Quantizer().quantize(ModelSpec(path), settings(method, **changes), list(calibration), str(out))


def check_modules(path: str, source: str, method: str) -> None:
    """The source's decoder linears are of the method's class, its other linears are ordinary ones."""
    before, after = load_model(source), load_model(path)
    ours = set(language_linears(before))
    kinds = {name: type(module).__name__ for name, module in after.named_modules()}
    assert {kinds[name] for name in ours} == {PACKED[method]}
    plain = {name: type(module).__name__ for name, module in before.named_modules() if isinstance(module, nn.Linear)}
    others = {name: kind for name, kind in plain.items() if name not in ours}
    assert {"lm_head", "model.multi_modal_projector.linear_1"} < set(others)
    assert any(name.startswith("model.vision_tower.") for name in others)
    assert {name: kinds[name] for name in others} == others
    assert sum(kind == PACKED[method] for kind in kinds.values()) == len(ours)


def image_logits(path: str, root: Path, count: int = 6) -> torch.Tensor:
    """Logits of a checkpoint in float32 for conversations about drawn images."""
    return model_logits(load_model(path), load_processor(path), root, count)


@torch.inference_mode()
def model_logits(model, processor, root: Path, count: int = 6) -> torch.Tensor:
    batch = collate(processor, draw_conversations(root, count))
    return model(**batch).logits.float()[batch["attention_mask"].bool()]


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


class Mortal(Quantizer):
    """Notes each search of a layer in run_dir/notes; dies at the second layer of a share, the first time."""

    def search(self, spec, settings, calibration, part, parts, folder):
        notes, search = Path(folder).parents[2] / "notes", awq.search_layer
        notes.mkdir(exist_ok=True)

        def noted(*given):
            own = len(list(notes.glob(f"{part}-{os.getpid()}-*")))
            (notes / f"{part}-{os.getpid()}-{own}").touch()
            if own == 1 and len(list(notes.glob(f"{part}-*"))) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            search(*given)

        awq.search_layer = noted
        try:
            return super().search(spec, settings, calibration, part, parts, folder)
        finally:
            awq.search_layer = search


class Unfinished(Mortal):
    """Its checkpoint cannot be written."""

    def finish(self, *_):
        raise OSError("No space left on device")
