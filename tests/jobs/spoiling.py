"""Ways to spoil a checkpoint."""

import torch
from safetensors.torch import load_file, save_file


def spoil(folder, name: str, value: float = torch.nan) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[0] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


UP = "language_model.model.layers.4.mlp.up_proj.weight"
