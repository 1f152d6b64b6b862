"""Importance of head groups and channels, by four criteria; the least important go. Axes: G groups, C channels.

magnitude: sum of |w| of a group's weights. taylor: sum of |w dL/dw| (LLM-Pruner, first order), over the calibration
conversations. activation: sum of |w| times the norm of the input that it multiplies, over the columns of the linears
that write (Wanda). random: a number from the seed.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from actors.answer_states import answer_states, weigh_gradients
from actors.checkpoint.loading import language_model
from actors.conversations import collate
from actors.narrowing.groups import Heads, group_sums, layer_shape
from actors.specs import Conversation, Llava

Layers = list[tuple[torch.Tensor, torch.Tensor]]  # (head groups [G], channels [C]) of every layer, float64


def score_groups(
    name: str, model: Llava, processor, conversations: Sequence[Conversation], seed: int
) -> tuple[Layers, "InputSums"]:
    """Return the scores by one of CRITERIA, and sums of the inputs of the linears that write."""
    inputs = InputSums(model)
    with torch.inference_mode(), inputs.watch():
        for batch in _batches(model, processor, conversations):
            answer_states(model, batch, False)
    return CRITERIA[name](model, processor, conversations, seed, inputs), inputs


class InputSums:
    """Sums over tokens of the inputs of every layer's writing linears, by (layer, linear): means and norms [C]."""

    def __init__(self, model: Llava):
        self._layers = language_model(model).layers
        shape = layer_shape(language_model(model).config)
        self._names = (shape.out, shape.down)
        self._sums: dict[tuple[int, str], torch.Tensor] = {}
        self._squares: dict[tuple[int, str], torch.Tensor] = {}
        self._tokens = 0

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Count the inputs of all forward passes in the block; one conversation at a time, so without padding."""

        def note(key: tuple[int, str]):
            def hook(module, args):
                rows = args[0].flatten(0, -2).double()
                self._tokens += len(rows) if key == (0, self._names[0]) else 0
                self._sums[key] = self._sums.get(key, 0) + rows.sum(0).cpu()
                self._squares[key] = self._squares.get(key, 0) + rows.square().sum(0).cpu()

            return hook

        hooks = [
            layer.get_submodule(name).register_forward_pre_hook(note((number, name)))
            for number, layer in enumerate(self._layers)
            for name in self._names
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def mean(self, layer: int, name: str) -> torch.Tensor:
        """Return the mean input."""
        return self._sums[layer, name] / self._tokens

    def norm(self, layer: int, name: str) -> torch.Tensor:
        """Return the root of the sum of squares."""
        return self._squares[layer, name].sqrt()


def _batches(model: Llava, processor, conversations: Sequence[Conversation]) -> Iterator[dict[str, torch.Tensor]]:
    device = next(model.parameters()).device
    for item in conversations:
        yield {name: tensor.to(device) for name, tensor in collate(processor, [item]).items()}


def _linears(layer: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}


def _reduced(linear: nn.Linear, of: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sums of `of(weight)` over columns and over rows; `of(bias)` is counted in the first."""
    scores = of(linear.weight)
    rows, columns = scores.sum(1, dtype=torch.float64).cpu(), scores.sum(0, dtype=torch.float64).cpu()
    return (rows if linear.bias is None else rows + of(linear.bias).double().cpu()), columns


def _grouped(model: Llava, sums: Sequence[dict]) -> Layers:
    text = language_model(model).config
    return [tuple(group_sums(linears, text)) for linears in sums]  # type: ignore[misc]


def _magnitude(model, processor, conversations, seed, inputs) -> Layers:
    layers = language_model(model).layers
    sums = [{n: _reduced(m, lambda w: w.detach().abs()) for n, m in _linears(layer).items()} for layer in layers]
    return _grouped(model, sums)


def _taylor(model, processor, conversations, seed, inputs) -> Layers:
    """Sum |w dL/dw| over conversations, L the mean loss per answer token; one layer's gradients are held at a time."""
    layers = [_linears(layer) for layer in language_model(model).layers]
    weights = {parameter for linears in layers for linear in linears.values() for parameter in linear.parameters()}
    sums: dict[nn.Parameter, tuple[torch.Tensor, ...]] = {}

    def note(weight: nn.Parameter, products: torch.Tensor) -> None:
        if not torch.isfinite(products).all():
            raise RuntimeError(
                "A gradient of the criterion taylor is not finite: choose model.dtype float32 or bfloat16, or another "
                "prune.width_criterion."
            )
        scores = products.double()
        found = (scores.sum(1).cpu(), scores.sum(0).cpu()) if scores.dim() == 2 else (scores.cpu(),)
        sums[weight] = tuple(a + b for a, b in zip(sums[weight], found, strict=True)) if weight in sums else found

    for item in conversations:
        weigh_gradients(model, collate(processor, [item]), weights, note)

    def reduced(linear: nn.Linear) -> tuple[torch.Tensor, torch.Tensor]:
        rows, columns = sums[linear.weight]
        return (rows if linear.bias is None else rows + sums[linear.bias][0]), columns

    return _grouped(model, [{name: reduced(linear) for name, linear in linears.items()} for linears in layers])


def _activation(model, processor, conversations, seed, inputs: InputSums) -> Layers:
    shape = layer_shape(language_model(model).config)
    sums = []
    for number, layer in enumerate(language_model(model).layers):
        linears = {name: _reduced(linear, lambda w: torch.zeros_like(w)) for name, linear in _linears(layer).items()}
        for name in (shape.out, shape.down):
            columns = layer.get_submodule(name).weight.detach().abs().sum(0, dtype=torch.float64).cpu()
            linears[name] = linears[name][0], columns * inputs.norm(number, name)
        sums.append(linears)
    return _grouped(model, sums)


def _random(model, processor, conversations, seed, inputs) -> Layers:
    stream, text = torch.Generator().manual_seed(seed), language_model(model).config

    def draw(count: int) -> torch.Tensor:
        return torch.rand(count, generator=stream, dtype=torch.float64)

    return [(draw(Heads.of(text).groups), draw(text.intermediate_size)) for _ in language_model(model).layers]


CRITERIA: dict[str, Callable[..., Layers]] = {
    "taylor": _taylor,
    "magnitude": _magnitude,
    "activation": _activation,
    "random": _random,
}
