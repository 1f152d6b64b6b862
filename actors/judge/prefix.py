"""The keys and values of the tokens with which every call begins: the rubric is read once and not with every call.

Left out where a layer looks at a window of positions only: the padding between prefix and prompt would count there.
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
        self._known: list[tuple[torch.Tensor, torch.Tensor]] = []

    def begin(self, prompts: Sequence[list[int]], prefix: list[int]) -> tuple[Any, int]:
        """Return a cache with a row for each prompt, and how many tokens it holds: all of `prefix`, or 0.

        It is 0 where the prompts do not all begin with the prefix, or one has nothing more.
        """
        cache, length = DynamicCache(config=self._model.config), len(prefix)
        begun = all(len(prompt) > length and prompt[:length] == prefix for prompt in prompts)
        if not self._usable or length < SHORTEST or not begun:
            return cache, 0
        if prefix != self._ids:
            self._read(prefix)
        for number, (keys, values) in enumerate(self._known):
            cache.update(keys.expand(len(prompts), -1, -1, -1), values.expand(len(prompts), -1, -1, -1), number)
        return cache, length

    def _read(self, prefix: list[int]) -> None:
        cache = DynamicCache(config=self._model.config)
        ids = torch.tensor([prefix], device=self._model.device)
        self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        self._ids, self._known = prefix, [(layer.keys, layer.values) for layer in cache.layers]
