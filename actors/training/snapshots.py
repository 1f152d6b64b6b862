"""Snapshots of a training: it goes on after a kill as if nobody had killed it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

FILE = "snapshot.safetensors"
_MOMENTS = ("exp_avg", "exp_avg_sq")


class Snapshots:
    """The last snapshot in `folder`: trained weights, the moments of AdamW, the rows of all steps."""

    def __init__(self, folder: Path, trained: Mapping[str, nn.Parameter], optimiser: torch.optim.AdamW):
        self._folder, self._trained, self._optimiser = folder, trained, optimiser

    def save(self, rows: Sequence[dict]) -> None:
        """Write a snapshot after the last of `rows`, atomically."""
        tensors: dict[str, torch.Tensor] = {}
        for name, weight in self._trained.items():
            state = self._optimiser.state.get(weight, {})  # empty, if the weight never had a gradient
            tensors |= {f"weight/{name}": weight.detach()}
            tensors |= {f"{key}/{name}": state[key] for key in _MOMENTS if state}
        self._folder.mkdir(parents=True, exist_ok=True)
        temporary = self._folder / f".{FILE}.partial"
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        save_file(tensors, temporary, metadata={"rows": json.dumps(list(rows))})
        temporary.rename(self._folder / FILE)

    def restore(self) -> list[dict]:
        """Put the last snapshot back and return its rows; [] if there is none."""
        if not (self._folder / FILE).is_file():
            return []
        with safe_open(self._folder / FILE, framework="pt") as file:
            rows = json.loads(file.metadata()["rows"])
            for name, weight in self._trained.items():
                weight.data.copy_(file.get_tensor(f"weight/{name}"))
                if f"{_MOMENTS[0]}/{name}" not in file.keys():  # noqa: SIM118 (not iterable)
                    continue
                moments = {key: file.get_tensor(f"{key}/{name}").to(weight.device) for key in _MOMENTS}
                self._optimiser.state[weight] = {"step": torch.tensor(float(len(rows))), **moments}
        return rows
