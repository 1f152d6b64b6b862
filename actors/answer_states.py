"""What a model computes at the tokens of reference answers: hidden states, and what a loss says of the weights.

Axes: A answer tokens, D width, L layers.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import nn

from actors.checkpoint.loading import pixel_dtype
from actors.maths.distillation import cross_entropy
from actors.specs import Llava

FLOAT16_LOSS_SCALE = 2.0**10  # gradients of float16 weights underflow without it


@dataclass(frozen=True)
class AnswerStates:
    """Hidden states at the positions that predict a batch's answer tokens, rows one after the other.

    last_AD: after the final norm. inputs_ALD: what enters layers 1, 2, ..., None unless it was asked for.
    """

    last_AD: torch.Tensor
    inputs_ALD: torch.Tensor | None
    targets_A: torch.Tensor


def answer_states(model: Llava, batch: dict[str, torch.Tensor], layers: bool) -> AnswerStates:
    """Run a batch of `collate` through a model; layers: return what enters its layers, too."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(pixel_dtype(model))
    out = model.model(**inputs, output_hidden_states=layers, use_cache=False)
    targets = batch["labels"][:, 1:]
    answers = targets != -100
    inputs_ALD = None
    if layers:  # hidden_states: what enters layer 0, 1, ..., then the last state
        entering = [states[:, :-1][answers] for states in out.hidden_states[1:-1]]
        inputs_ALD = torch.stack(entering, 1) if entering else None
    return AnswerStates(out.last_hidden_state[:, :-1][answers], inputs_ALD, targets[answers])


def weigh_gradients(
    model: Llava,
    batch: dict[str, torch.Tensor],
    weights: Collection[nn.Parameter],
    note: Callable[[nn.Parameter, torch.Tensor], None],
) -> None:
    """Call note(weight, |w dL/dw|) for every weight, in float32; L: mean loss per answer token (nats) of the batch.

    batch: what `collate` gives. A gradient is dropped when it was noted, so that few are in memory at a time.
    """
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    scale = FLOAT16_LOSS_SCALE if model.lm_head.weight.dtype == torch.float16 else 1.0

    def weigh(weight: nn.Parameter) -> None:
        assert weight.grad is not None
        note(weight, (weight.detach().float() * weight.grad.float()).abs() / scale)
        weight.grad = None

    handles = []
    try:
        for parameter in before:
            parameter.requires_grad_(parameter in weights)
        handles = [weight.register_post_accumulate_grad_hook(weigh) for weight in weights]
        device = model.lm_head.weight.device
        states = answer_states(model, {name: tensor.to(device) for name, tensor in batch.items()}, False)
        loss = cross_entropy(model.lm_head(states.last_AD).float(), states.targets_A) / len(states.targets_A)
        (loss * scale).backward()
    finally:
        for handle in handles:
            handle.remove()
        for parameter, requires in before.items():
            parameter.requires_grad_(requires)
