"""A patch without training: a linear map stands in for removed layers (ReplaceMe, Shopkhoev et al. 2025, section 2).

Let a run of removed layers follow layer i. With M the output of layer i's MLP, Y the rest of layer i's output, and L
the output of the last removed layer, all in the original, the map W minimises |M W + Y - L|^2 over the calibration
tokens, with a small penalty that draws it to the identity. It is folded into the MLP's last linear, so that the
checkpoint has the shape of a pruned one.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from actors.checkpoint.loading import language_model, load_model, load_processor, quiet
from actors.conversations import collate
from actors.maths.linear_map import LinearFit
from actors.specs import Conversation, ModelSpec
from actors.training.writing import load_stored, write_changed

RIDGE = 1e-3


def removed_runs(kept_layers: Sequence[int], layers: int) -> dict[int, int]:
    """Return {kept layer i: last removed layer of the run that follows it}; a run at the start follows none."""
    following = [*kept_layers[1:], layers]
    return {layer: after - 1 for layer, after in zip(kept_layers, following, strict=True) if after - layer > 1}


def last_linear(layer: nn.Module) -> nn.Linear:
    """Return the last linear of a decoder layer's MLP: its output is the MLP's."""
    return [module for module in layer.mlp.modules() if isinstance(module, nn.Linear)][-1]


class Patcher:
    """A worker that holds the original, and fits the maps of a pruned checkpoint of it."""

    def __init__(self, spec: ModelSpec):
        quiet()
        self._model = load_model(**spec.loading)
        self._processor = load_processor(spec.path, spec.revision, spec.trust_remote_code)

    def patch(
        self, pruned: ModelSpec, kept_layers: Sequence[int], conversations: Sequence[Conversation], out: str
    ) -> dict:
        """Write the pruned checkpoint with its maps folded in to `out`.

        kept_layers: the original's layers that it has. Returns {layers: its patched layers, errors: by patched layer
        the squared error of what it passes on, as a share of that without a map}.
        """
        runs = removed_runs(kept_layers, len(language_model(self._model).layers))
        if not runs:
            raise ValueError(
                "All removed layers are at the start of the model: recover.train patch needs a kept layer before them."
            )
        fits, errors = self._fit(runs, conversations)
        patched = load_stored(pruned)
        numbers = {old: new for new, old in enumerate(kept_layers)}
        for layer, map_DD in fits.items():
            fold(last_linear(language_model(patched).layers[numbers[layer]]), map_DD.cpu())
        write_changed(patched, self._processor, pruned, Path(out))
        return {"layers": sorted(numbers[layer] for layer in fits), "errors": errors}

    @torch.inference_mode()
    def _fit(
        self, runs: dict[int, int], conversations: Sequence[Conversation]
    ) -> tuple[dict[int, torch.Tensor], list[float]]:
        """Return the map of every run by the layer before it, and what error each leaves."""
        layers = language_model(self._model).layers
        device = next(self._model.parameters()).device
        width = last_linear(layers[0]).out_features
        fits = {layer: LinearFit(width, device) for layer in runs}
        with record_outputs(layers, runs) as outputs:
            for item in conversations:
                batch = collate(self._processor, [item])
                del batch["labels"]
                self._model.model(**{name: tensor.to(device) for name, tensor in batch.items()}, use_cache=False)
                for layer, last in runs.items():
                    mlp, rest = outputs[layer]["mlp"], outputs[layer]["out"] - outputs[layer]["mlp"]
                    fits[layer].add(mlp, outputs[last]["out"] - rest)
        maps = {layer: fit.solve(RIDGE) for layer, fit in fits.items()}
        return maps, [fits[layer].error(map_DD) for layer, map_DD in sorted(maps.items())]


def fold(linear: nn.Linear, map_DD: torch.Tensor) -> None:
    """Replace a linear's weight and bias, so that its output is what it was times the map."""
    with torch.no_grad():
        linear.weight.copy_((map_DD.T @ linear.weight.double()).to(linear.weight.dtype))
        if linear.bias is not None:
            linear.bias.copy_((linear.bias.double() @ map_DD).to(linear.bias.dtype))


@contextmanager
def record_outputs(layers: nn.ModuleList, runs: dict[int, int]) -> Iterator[dict[int, dict[str, torch.Tensor]]]:
    """Record the outputs [T, D] of the MLP and of the whole layer, of the layers in `runs`, at every forward pass."""
    outputs: dict[int, dict[str, torch.Tensor]] = {number: {} for number in {*runs, *runs.values()}}

    def note(number: int, key: str):
        def hook(module, args, output):
            outputs[number][key] = (output[0] if isinstance(output, tuple) else output).flatten(0, -2).float()

        return hook

    hooks = [
        module.register_forward_hook(note(number, key))
        for number in outputs
        for module, key in ((layers[number].mlp, "mlp"), (layers[number], "out"))
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()
