"""The teacher of a distillation: its hidden states are computed once, written to disk, and read while training.

So teacher and student are never in memory together, and all students of one teacher share its states. Its logits are
not stored: its output head is, and makes them from the last hidden state. Axes: A answer tokens, D width, L layers.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from actors.answer_states import answer_states
from actors.checkpoint.loading import load_model, load_processor, quiet
from actors.conversations import collate
from actors.specs import Conversation, ModelSpec

HEAD = "head.safetensors"


class Teacher:
    """A worker that holds the teacher, and runs `rows` conversations at a time.

    layers: note what enters its layers, too, for the objective "layers".
    """

    def __init__(self, spec: ModelSpec, rows: int, layers: bool):
        quiet()
        self._model = load_model(**spec.loading)
        self._processor = load_processor(spec.path, spec.revision, spec.trust_remote_code)
        self._rows, self._layers = rows, layers

    def write_head(self, folder: str) -> None:
        """Write the output head: what makes logits from the last hidden state."""
        head = self._model.lm_head
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in head.named_parameters()}
        _save(tensors, Path(folder) / HEAD)

    @torch.inference_mode()
    def write_states(self, conversations: Sequence[Conversation], folder: str, name: str) -> int:
        """Write the states of conversations to folder/name.safetensors; return its bytes.

        Keys: `last/<id>` [A, D] and, with `layers`, `inputs/<id>` [A, L - 1, D], in the model's own type.
        """
        device = next(self._model.parameters()).device
        tensors: dict[str, torch.Tensor] = {}
        for start in range(0, len(conversations), self._rows):
            part = conversations[start : start + self._rows]
            batch = {key: value.to(device) for key, value in collate(self._processor, part).items()}
            states = answer_states(self._model, batch, self._layers)
            lengths = (batch["labels"][:, 1:] != -100).sum(1).tolist()
            columns = {"last": states.last_AD, "inputs": states.inputs_ALD}
            for kind, column in columns.items():
                if column is not None:
                    rows = zip(part, column.cpu().split(lengths), strict=True)
                    tensors |= {f"{kind}/{item.id}": row.contiguous() for item, row in rows}
        path = Path(folder) / f"{name}.safetensors"
        _save(tensors, path)
        return path.stat().st_size


class TeacherStates:
    """Reads what Teacher wrote, in float32 on `device`.

    kept_layers: the teacher's layers that the student still has, for the objective "layers".
    """

    def __init__(self, folder: str, device: torch.device, kept_layers: Sequence[int]):
        self._folder, self._device, self._kept = Path(folder), device, kept_layers
        self._files: dict[str, Any] = {}
        for path in sorted(self._folder.glob("states-*.safetensors")):
            file = safe_open(path, framework="pt")
            self._files |= dict.fromkeys(file.keys(), file)

    def last(self, conversations: Sequence[Conversation]) -> torch.Tensor:
        """Return the last hidden states [A, D] of conversations, one after the other."""
        return self._place(torch.cat([self._read(f"last/{item.id}") for item in conversations]))

    def inputs(self, conversations: Sequence[Conversation]) -> torch.Tensor:
        """Return what entered the kept layers but the first [A, L - 1, D]."""
        places = [layer - 1 for layer in self._kept[1:]]
        return self._place(torch.cat([self._read(f"inputs/{item.id}")[:, places] for item in conversations]))

    def logits(self, last_AD: torch.Tensor) -> torch.Tensor:
        """Return the teacher's logits [A, V] from its last hidden states."""
        return torch.nn.functional.linear(last_AD, self._head["weight"], self._head.get("bias"))

    @cached_property
    def _head(self) -> dict[str, torch.Tensor]:
        return {name: self._place(tensor) for name, tensor in load_file(self._folder / HEAD).items()}

    def _place(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._device, torch.float32)

    def _read(self, key: str) -> torch.Tensor:
        if key not in self._files:
            raise ValueError(f"The teacher's states in {str(self._folder)!r} lack {key!r}.")
        return self._files[key].get_tensor(key)


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a file atomically: a reader, or a run that goes on after a kill, sees all of it or none."""
    temporary = path.with_name(f".{path.name}.partial")
    save_file(tensors, temporary)
    temporary.chmod(0o644)
    temporary.rename(path)
