"""Writing a GGUF file tensor by tensor: one of them is in memory at a time."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch

from actors.checkpoint.tensors import published_name, read_tensor, tensor_places, tensor_shapes
from actors.export.ggml import Kind, stored_bytes


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its name there, its shape as torch has it, its type, and what reads and encodes it."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    data: Callable[[], np.ndarray]


class Stored:
    """A checkpoint's tensors under their published names, read one at a time."""

    def __init__(self, folder: Path):
        self._places = tensor_places(folder)
        self._shapes = {published_name(name): shape for name, (shape, _) in tensor_shapes(folder).items()}

    def names(self, prefix: str) -> Iterator[str]:
        """Yield the names that begin with `prefix`, in order."""
        return (name for name in self._places if name.startswith(prefix))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return tuple(self._shapes[name])

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor as it is stored."""
        return read_tensor(*self._places[name])


def write_file(writer: gguf.GGUFWriter, path: Path, tensors: Iterable[Entry]) -> None:
    """Write the keys that `writer` has and the tensors to `path`."""
    tensors = list(tensors)
    for entry in tensors:
        size = stored_bytes(entry.shape, entry.kind)
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float16), size, entry.kind)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry in tensors:
        writer.write_tensor_data(entry.data())
    writer.close()


def describe(writer: gguf.GGUFWriter, name: str, licence: str | None) -> gguf.GGUFWriter:
    """Return the writer with what every file says of itself."""
    writer.add_name(name)
    writer.add_description("Made by Prunella; not for clinical use.")
    if licence:
        writer.add_license(licence)
    return writer
