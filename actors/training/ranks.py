"""Data parallel training: the processes of a torch process group each take their part of a step.

Without a process group there is one rank, and nothing is exchanged.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import distributed, nn

BUCKET = 1 << 25  # gradients that are sent together: 128 MiB in float32


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
    """Sum the weights' gradients over the ranks, some BUCKET numbers at a time; a rank without a gradient adds 0."""
    if count_ranks() == 1:
        return
    bucket: list[torch.Tensor] = []
    for weight in weights:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        bucket.append(weight.grad)
        if sum(gradient.numel() for gradient in bucket) >= BUCKET:
            _add_up_bucket(bucket)
            bucket = []
    if bucket:
        _add_up_bucket(bucket)


def _add_up_bucket(gradients: list[torch.Tensor]) -> None:
    flat = nn.utils.parameters_to_vector(gradients)
    _all_reduce(flat)
    nn.utils.vector_to_parameters(flat, gradients)


def _all_reduce(tensor: torch.Tensor) -> None:
    """Sum a tensor over the ranks, in place; ConnectionError: another rank is gone."""
    try:
        distributed.all_reduce(tensor)
        if tensor.is_cuda:
            torch.cuda.synchronize(tensor.device)  # a lost rank shows here
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ConnectionError(f"Rank {rank()} lost another rank of the training: {error}") from error
