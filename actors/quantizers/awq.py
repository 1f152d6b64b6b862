"""AWQ (Lin et al. 2024; paper eq. 6-8), one decoder layer at a time: search scales and clipping, round, pack.

A layer's weights are read from the file when its turn comes and freed before the next; the calibration inputs pass
through the layers as they were before rounding, as in the authors' code.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call

from actors.maths.awq import ROWS, best_limit, clip, grid_errors, group_gram, scale_grid
from actors.quantizers.calibration import inputs_of_checkpoint, rows_at_once
from actors.quantizers.rtn import write_gemm
from actors.quantizers.storage import fill, other_tensors, read_layers, release
from actors.quantizers.structure import NEVER_CLIPPED, ScalingGroup, empty_decoder, scaling_groups
from actors.specs import Conversation, ModelSpec, QuantizeSettings


def quantize_awq(
    source: Path,
    config,
    settings: QuantizeSettings,
    out: Path,
    spec: ModelSpec,
    calibration: Sequence[Conversation],
) -> dict:
    """Scale, clip and round the checkpoint `source`; returns {calibration_tokens}.

    The search is that of settings.awq_search: autoawq's, or the one of this file. ValueError: no calibration
    conversations, or a checkpoint that does not hold what its config says.
    """
    if settings.awq_search == "autoawq":
        from actors.quantizers.autoawq import quantize_autoawq

        return quantize_autoawq(source, config, settings, out, spec, calibration)
    hidden, kwargs = inputs_for(spec, source, config, calibration)
    write_gemm(source, config, settings, out, scaled_tensors(source, config, settings, hidden, kwargs))
    return {"calibration_tokens": hidden.shape[0] * hidden.shape[1]}


def search_to_files(
    spec: ModelSpec,
    source: Path,
    config,
    settings: QuantizeSettings,
    calibration: Sequence[Conversation],
    chosen: Sequence[int],
    folder: Path,
) -> dict:
    """Write each of the `chosen` layers, scaled and clipped, to a file of its own in `folder`, unless it is there.

    Returns {calibration_tokens}; ValueError as `quantize_awq`.
    """
    hidden, kwargs = inputs_for(spec, source, config, calibration)
    missing = [number for number in chosen if not _layer_file(folder, number).exists()]
    for number, tensors in searched_layers(source, config, hidden, kwargs, dict.fromkeys(missing, settings)):
        temporary = _layer_file(folder, number).with_suffix(f".{os.getpid()}")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
        temporary.rename(_layer_file(folder, number))
        tensors.clear()  # free before the next layer is read
    return {"calibration_tokens": hidden.shape[0] * hidden.shape[1]}


def write_searched(source: Path, config, settings: QuantizeSettings, folder: Path, out: Path) -> None:
    """Round the layers that `search_to_files` wrote to `folder` (all of them), and write the checkpoint to `out`."""

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for number in range(config.text_config.num_hidden_layers):
            yield from load_file(_layer_file(folder, number)).items()
        yield from other_tensors(source)

    write_gemm(source, config, settings, out, tensors())


def _layer_file(folder: Path, number: int) -> Path:
    return folder / f"layer-{number:05d}.safetensors"


def inputs_for(
    spec: ModelSpec, source: Path, config, calibration: Sequence[Conversation]
) -> tuple[torch.Tensor, list[dict]]:
    """Return the first decoder layer's inputs and every layer's arguments; ValueError: no calibration conversations."""
    if not calibration:
        raise ValueError("AWQ needs calibration conversations from the training split, and there are none.")
    return inputs_of_checkpoint(spec, source, config, calibration)


def scaled_tensors(
    source: Path, config, settings: QuantizeSettings, hidden: torch.Tensor, kwargs: list[dict]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the checkpoint's tensors, the decoder layers scaled and clipped, not rounded; `hidden` is overwritten."""
    for _, tensors in searched_layers(source, config, hidden, kwargs, dict.fromkeys(range(len(kwargs)), settings)):
        for name in list(tensors):
            yield name, tensors.pop(name)  # free before the next layer is read
    yield from other_tensors(source)


def searched_layers(
    source: Path, config, hidden: torch.Tensor, kwargs: list[dict], chosen: Mapping[int, QuantizeSettings]
) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """Yield (number, tensors by their names in the file) of the `chosen` layers, scaled and clipped, in order.

    chosen: number -> settings. hidden: the first layer's input; it is overwritten layer by layer, up to the last chosen
    one.
    """
    decoder = empty_decoder(config)
    layers = read_layers(source, len(decoder.layers))
    for number in range(max(chosen, default=-1) + 1):
        layer, tensors = decoder.layers[number], next(layers)
        names = {part: name for part, (name, _) in tensors.items()}
        fill(layer, tensors, hidden)
        del tensors
        if number in chosen:
            search_layer(layer, hidden, kwargs[number], chosen[number])
            yield number, {names[part]: layer.get_parameter(part).detach().cpu() for part in names}
        else:
            pass_through(layer, hidden, kwargs[number])
        layer.to("meta")
        release()


@torch.no_grad()
def pass_through(layer: nn.Module, hidden: torch.Tensor, kwargs: dict) -> None:
    """Overwrite `hidden` [B, T, D], a decoder layer's input, with its output, some rows at a time."""
    for part in hidden.split(rows_at_once(hidden.shape[1])):
        part.copy_(_first(layer(part, **kwargs)))


@torch.no_grad()
def search_layer(layer: nn.Module, hidden: torch.Tensor, kwargs: dict, settings: QuantizeSettings) -> None:
    """Scale and clip one decoder layer in place; overwrite its input `hidden` [B, T, D] with its output before that.

    Two passes over the inputs, some rows at a time: the first collects each input channel's mean |X| and the Gram
    matrices for clipping, the second the errors of all scales.
    """
    group, bits = settings.group_size, settings.bits
    groups = scaling_groups(layer)
    linears = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    clipped = [name for name in linears if name not in NEVER_CLIPPED] if settings.clip else []
    total: dict[ScalingGroup, torch.Tensor] = {}
    grams: dict[str, torch.Tensor] = {}
    parts = hidden.split(rows_at_once(hidden.shape[1]))
    for part in parts:
        inputs, _ = _run(layer, part, kwargs)
        for g in groups:
            total[g] = total.get(g, 0) + inputs[g.linears[0]].float().abs().sum((0, 1))
        for name in clipped:
            grams[name] = grams.get(name, 0) + group_gram(inputs[name].flatten(0, 1), group)
        del inputs
    grids = {g: scale_grid(total[g] / hidden.shape[:2].numel()) for g in groups}
    errors: dict[ScalingGroup, torch.Tensor] = {}
    for part in parts:
        inputs, output = _run(layer, part, kwargs)
        for g in groups:
            errors[g] = errors.get(g, 0) + _errors(layer, g, inputs[g.linears[0]], kwargs, grids[g], group, bits)
        part.copy_(output)
        del inputs, output
    for g in groups:
        scale = grids[g][errors[g].argmin()]
        _apply(layer, g, scale)
        for name in set(g.linears) & set(grams):
            inverse = scale.reciprocal().reshape(-1, group)
            grams[name] *= inverse[:, :, None] * inverse[:, None, :]
    for name, gram in grams.items():
        for rows in linears[name].weight.split(ROWS):
            rows.copy_(clip(rows, best_limit(rows, gram, bits)))


def _run(layer: nn.Module, hidden: torch.Tensor, kwargs: dict) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return the inputs of a layer's linears, by name, and its output."""
    inputs: dict[str, torch.Tensor] = {}

    def note(name: str):
        return lambda module, args: inputs.update({name: args[0]})

    modules = [(name, module) for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
    handles = [module.register_forward_pre_hook(note(name)) for name, module in modules]
    try:
        output = _first(layer(hidden, **kwargs))
    finally:
        for handle in handles:
            handle.remove()
    return inputs, output


def _errors(layer: nn.Module, g: ScalingGroup, x: torch.Tensor, kwargs: dict, grid, group: int, bits: int):
    names = [f"{name}.weight" for name in g.linears]

    def output(inspected: str, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        stem, arguments = f"{inspected}.", kwargs if inspected == "self_attn" else {}
        parameters = {name.removeprefix(stem): weight for name, weight in weights.items() if name.startswith(stem)}
        return _first(functional_call(layer.get_submodule(inspected), parameters, (x,), arguments))

    def run(weights: list[torch.Tensor]) -> torch.Tensor:
        named = dict(zip(names, weights, strict=True))
        return sum(output(inspected, named) for inspected in g.inspected)

    return grid_errors(run, [layer.get_parameter(name) for name in names], grid, group, bits)


def _first(output) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def _apply(layer: nn.Module, g: ScalingGroup, scale: torch.Tensor) -> None:
    before = layer.get_submodule(g.before)
    before.weight.div_(scale if before.weight.dim() == 1 else scale[:, None])
    if getattr(before, "bias", None) is not None:
        before.bias.div_(scale)
    for name in g.linears:
        layer.get_submodule(name).weight.mul_(scale)
