"""What a model's modules allocate while they run, counted by storages: the peak that an allocator would report.

Works on any device, and on fake tensors, which have none: transformers' own code for LLaVA-1.5-7B is traced in
seconds. What a kernel takes for itself and gives back before it returns is not seen.
"""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Within it `now` and `peak` are the bytes of all storages that were made since and are alive; not the model's."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.now = self.peak = 0
        self._weights = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run the operator and note the storages of what it returns."""
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._weights or key in self._alive:
            return
        self._alive[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self.now -= self._alive.pop(key)


def generated(model: torch.nn.Module, inputs: dict[str, torch.Tensor], new_tokens: int) -> int:
    """Return the peak bytes of plain `generate` beyond the weights, its inputs counted."""
    with Allocations(model) as trace:
        model.generate(**inputs, min_new_tokens=new_tokens, max_new_tokens=new_tokens, do_sample=False)
    return trace.peak + sum(tensor.nbytes for tensor in inputs.values())
