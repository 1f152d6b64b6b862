"""Data parallel training: the processes of a torch process group each take their part of a step.

Without a process group there is one rank, and nothing is exchanged.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import distributed, nn


def count_ranks() -> int:
    """Return how many processes train together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """Return this process's place among them, 0 for the first."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def add_up(values: Sequence[float], device: torch.device) -> list[float]:
    """Return each value summed over the ranks."""
    if count_ranks() == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    _all_reduce(sums)
    return sums.tolist()


def add_up_gradients(weights: Iterable[nn.Parameter]) -> None:
    """Sum the weights' gradients over the ranks, in one message; a rank without a gradient adds 0."""
    if count_ranks() == 1:
        return
    weights = list(weights)
    gradients = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
    flat = nn.utils.parameters_to_vector(gradients)
    _all_reduce(flat)
    nn.utils.vector_to_parameters(flat, gradients)
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient


def _all_reduce(tensor: torch.Tensor) -> None:
    try:
        distributed.all_reduce(tensor)
    except RuntimeError as error:
        raise ConnectionError(f"Rank {rank()} lost another rank of the training: {error}") from error
