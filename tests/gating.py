"""The gate as the tests call it, and ways to break what it checks."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from actors.gate.check import Gate
from actors.specs import Change, GateError, ModelSpec

LAYER = "language_model.model.layers.{}.{}"
UP = LAYER.format(1, "mlp.up_proj")


def check(folder, parent=None, removed=None, change=None, **options) -> dict:
    """Check a folder against its parent: `removed` says that it was pruned, else it was rounded, or `change`."""
    change = change or (Change.ROUNDED if removed is None else Change.PRUNED)
    spec = ModelSpec(str(parent)) if parent else None
    return Gate().check(ModelSpec(str(folder)), spec, change if parent else None, removed or (), **options)


def refused(words: str, folder, *arguments, **options) -> None:
    with pytest.raises(GateError, match=words):
        check(folder, *arguments, **options)


def change(folder: Path, edit) -> None:
    """Rewrite a checkpoint's one file of weights after `edit(tensors)`."""
    tensors = load_file(folder / "model.safetensors")
    tensors = edit(tensors) or tensors
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **text) -> None:
    """Change entries of a checkpoint's text_config."""
    config = json.loads((folder / "config.json").read_text())
    config["text_config"].update(text)
    (folder / "config.json").write_text(json.dumps(config))


def swap(tensors: dict, part: str = "mlp.up_proj") -> None:
    """Swap a linear's weight between layers 1 and 2."""
    one, other = (f"{LAYER.format(number, part)}.weight" for number in (1, 2))
    tensors[one], tensors[other] = tensors[other], tensors[one]
