"""Caches the keys and values of the prefix that all calls share, so that the rubric is prefilled only once.

Not used with sliding windows, in which the padding between prefix and prompt would count.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

SHORTEST = 16  # tokens; a shorter prefix is not worth it


class SharedPrefix:
    """Remembers the keys and values of one prefix at a time."""

    def __init__(self, model: Any):
        self._model = model
        layers = DynamicCache(config=model.config).layers
        self._usable = bool(layers) and all(type(layer) is DynamicLayer for layer in layers)
        self._ids: list[int] = []
        self._layers: list[tuple[torch.Tensor, torch.Tensor]] = []

    def begin(self, prompts: Sequence[list[int]], prefix: list[int]) -> tuple[Any, int]:
        """Return a cache with a row for each prompt, and how many tokens it holds: all of `prefix`, or 0.

        It is 0 if a prompt does not begin with the prefix, or has no token after it.
        """
        cache, length = DynamicCache(config=self._model.config), len(prefix)
        shared = all(len(prompt) > length and prompt[:length] == prefix for prompt in prompts)
        if not self._usable or length < SHORTEST or not shared:
            return cache, 0
        if prefix != self._ids:
            self._read(prefix)
        for number, (keys, values) in enumerate(self._layers):
            cache.update(keys.expand(len(prompts), -1, -1, -1), values.expand(len(prompts), -1, -1, -1), number)
        return cache, length

    def _read(self, prefix: list[int]) -> None:
        cache = DynamicCache(config=self._model.config)
        ids = torch.tensor([prefix], device=self._model.device)
        self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        self._ids, self._layers = prefix, [(layer.keys, layer.values) for layer in cache.layers]
