"""The losses of distillation: by hand, and against naive sums in float64."""

import math

import pytest
import torch

from actors.maths.distillation import cross_entropy, forward_kl, hidden_error, reverse_kl


def naive_kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def softmax(logits: list[float], temperature: float) -> list[float]:
    weights = [math.exp(each / temperature) for each in logits]
    return [weight / sum(weights) for weight in weights]


def test_by_hand():
    """One token, two words: the student is even, the teacher has odds of 3 to 1."""
    student, teacher = torch.zeros(1, 2), torch.tensor([[math.log(3.0), 0.0]])
    assert cross_entropy(student, torch.tensor([0])).item() == pytest.approx(math.log(2))
    assert forward_kl(student, teacher, 1.0).item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert reverse_kl(student, teacher, 1.0).item() == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2))
    # Two tokens of width 2: errors (1, 3) and (0, 2) have the means 5 and 2.
    states = torch.tensor([[1.0, 3.0], [0.0, 2.0]])
    assert hidden_error(states, torch.zeros(2, 2)).item() == pytest.approx(5 + 2)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_against_naive_sums(temperature):
    random = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(5, 7, generator=random, dtype=torch.float64) for _ in range(2))
    pairs = [
        (softmax(s, temperature), softmax(t, temperature))
        for s, t in zip(student.tolist(), teacher.tolist(), strict=True)
    ]
    forward = temperature**2 * sum(naive_kl(t, s) for s, t in pairs)
    backward = temperature**2 * sum(naive_kl(s, t) for s, t in pairs)
    assert forward_kl(student, teacher, temperature).item() == pytest.approx(forward, rel=1e-12)
    assert reverse_kl(student, teacher, temperature).item() == pytest.approx(backward, rel=1e-12)
    targets = torch.tensor([0, 6, 3, 3, 1])
    expected = -sum(math.log(softmax(row, 1.0)[t]) for row, t in zip(student.tolist(), targets.tolist(), strict=True))
    assert cross_entropy(student, targets).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("loss", [hidden_error, forward_kl, reverse_kl], ids=lambda loss: loss.__name__)
def test_only_the_student_learns_and_equals_lose_nothing(loss):
    options = () if loss is hidden_error else (2.0,)
    student, teacher = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    loss(student, teacher, *options).backward()
    assert student.grad.norm() > 0 and teacher.grad is None
    assert loss(student, student.clone(), *options).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("loss", [forward_kl, reverse_kl], ids=lambda loss: loss.__name__)
def test_the_gradient_keeps_its_size_as_the_temperature_grows(loss):
    """Without the factor it would fall with 1/tau^2: from 8 to 64 by 64 times."""
    norms = []
    for temperature in (8.0, 64.0):
        student = torch.tensor([[1.0, 0.0, -1.0]], dtype=torch.float64, requires_grad=True)
        loss(student, torch.tensor([[0.0, 2.0, 0.5]], dtype=torch.float64), temperature).backward()
        norms.append(student.grad.norm().item())
    assert norms[1] == pytest.approx(norms[0], rel=0.2)
