"""Losses of fine-tuning and distillation, summed over the answer tokens of a batch.

Axes: A answer tokens, D width, V vocabulary. They are sums, so that the caller can divide by the answer tokens of a
whole step, however that is cut into micro-batches. Only the student's tensors get gradients.
"""

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional


def cross_entropy(logits_AV: Float[Tensor, "a v"], targets_A: Int[Tensor, "a"]) -> Float[Tensor, ""]:
    """Return the sum of -log p(target) (nats)."""
    return functional.cross_entropy(logits_AV, targets_A, reduction="sum")


def hidden_error(student_AD: Float[Tensor, "a d"], teacher_AD: Float[Tensor, "a d"]) -> Float[Tensor, ""]:
    """Return the sum over tokens of the mean squared error of hidden states (second paper, hidden-state L2)."""
    return (student_AD - teacher_AD.detach()).square().mean(-1).sum()


def forward_kl(
    student_AV: Float[Tensor, "a v"], teacher_AV: Float[Tensor, "a v"], temperature: float
) -> Float[Tensor, ""]:
    """Return tau^2 times the sum of KL(teacher || student) of the distributions softmax(logits / tau) (nats).

    The factor tau^2 keeps the gradient's size as tau changes (Hinton et al. 2015).
    """
    student_AV, teacher_AV = _log_probabilities(student_AV, teacher_AV, temperature)
    return functional.kl_div(student_AV, teacher_AV, reduction="sum", log_target=True) * temperature**2


def reverse_kl(
    student_AV: Float[Tensor, "a v"], teacher_AV: Float[Tensor, "a v"], temperature: float
) -> Float[Tensor, ""]:
    """Return tau^2 times the sum of KL(student || teacher) of the distributions softmax(logits / tau) (nats)."""
    student_AV, teacher_AV = _log_probabilities(student_AV, teacher_AV, temperature)
    return functional.kl_div(teacher_AV, student_AV, reduction="sum", log_target=True) * temperature**2


def _log_probabilities(student_AV: Tensor, teacher_AV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    return (student_AV / temperature).log_softmax(-1), (teacher_AV.detach() / temperature).log_softmax(-1)
