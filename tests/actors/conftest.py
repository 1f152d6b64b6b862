"""What several tests of the actors room share: drawn images, and saved tiny checkpoints."""

import pytest

from actors.derm_tiny.draw import write_tree
from actors.loading import quiet
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
