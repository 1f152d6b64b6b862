"""What several tests of the actors room share: drawn images, and saved tiny checkpoints."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from actors.checkpoint.loading import quiet
from actors.derm_tiny.draw import write_tree
from actors.images import QUESTION, probe_image
from actors.specs import Sample
from tests.actors.local_judging import judge, path  # noqa: F401 (fixtures)
from tests.tiny import rename_tensors, save_tiny

quiet()


@pytest.fixture(scope="session")
def lesions(tmp_path_factory):
    """A drawn tree of 24 images, with annotations.csv."""
    root = tmp_path_factory.mktemp("lesions")
    write_tree(root, per_class=2, seed=5)
    return root


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory):
    """A CLIP and Llama checkpoint under the published tensor names; tests must not change it."""
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(folder, "clip-llama")
    rename_tensors(folder, "published")
    return str(folder)


@pytest.fixture(scope="session")
def wide_path(tiny_path, tmp_path_factory):
    """The tiny model with 160 MiB more in its embeddings and its head, which ids never reach."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    shutil.copytree(tiny_path, folder)
    config = json.loads((folder / "config.json").read_text())
    rows = config["text_config"]["vocab_size"] + 160 * 2**20 // (2 * 64 * 4)
    config["text_config"]["vocab_size"] = rows
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("embed_tokens.weight", "lm_head.weight"))]:
        more = torch.zeros(rows, tensors[name].shape[1])
        more[: len(tensors[name])] = tensors[name]
        tensors[name] = more
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.fixture(scope="session")
def probe(tmp_path_factory):
    """A question that needs no drawn tree."""
    image = tmp_path_factory.mktemp("probe") / "probe.png"
    probe_image().save(image)
    return Sample("probe", str(image), QUESTION)
