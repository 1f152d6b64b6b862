"""Compares each decoder layer with the one in the model before, for the gate.

Both layers get the same input, which the model before computes from the probe. The outputs W x [T, out] of their
linears are compared, not the weights: AWQ divides a linear's input by scales and multiplies the weight's columns by
them. It also scales the outputs of v_proj and up_proj: these are compared up to one factor per output.
"""

from collections.abc import Iterator
from operator import attrgetter

import torch
from torch import nn
from torch.func import functional_call

from actors.checkpoint.loading import language_model
from actors.gate.linears import KERNEL, may_be_scaled, stated_bits, stated_group
from actors.gate.parent import Parent
from actors.maths.awq import rounded
from actors.probe import placed_probe
from actors.quantizers.calibration import decoder_inputs
from actors.quantizers.structure import AWQ_GROUPS, scaling_groups
from actors.quantizers.table import for_bits
from actors.specs import GateError

# Largest relative error of a linear's outputs in a layer that AWQ rounded, by bits. Sound linears have at most .02,
# .17, .36 and .72 (derm-tiny, and random models of six architectures), linears swapped between layers at least .84.
# down_proj's input is off already: its sound errors are .02, .26, .53 and 1.01, its swapped ones 1.29. Phi's dense and
# fc2 need no bound of their own: their sound errors are .01, .17, .36 and .72, their swapped ones 1.27.
SCALED = {8: 0.2, 4: 0.4, 3: 0.55, 2: 0.78}
DOWN = 1.5  # times as much for down_proj
EQUAL = 5e-3  # largest relative difference of a tensor that keeps 16 bits


def check_layers(parent: Parent, model, processor, rounding, same: float) -> tuple[str, str | None]:
    """Refuse a decoder layer that computes something else than in the model before; GateError names the first linear.

    rounding: the config of a checkpoint with rounded weights, None where nothing was rounded. same: the largest error
    of what was not rounded. A layer whose linears are those of the model before, rounded to nearest, passes whatever
    the error of its outputs, which outlier activations make large. If AWQ cannot have rounded the checkpoint, the
    weights are checked instead (actors.gate.linears). Returns (findings, the first linear whose error exceeds SCALED).
    """
    layers = language_model(model).layers
    embedded, arguments = decoder_inputs(model, placed_probe(model, processor), len(layers))
    error = _relative_error(embedded.float(), parent.embedded.float())
    if not error <= same:
        raise GateError(
            f"The decoder's input differs from that in the model before by {error:.2g} (allowed: {same:g}): check the "
            "vision tower, the projector, the embeddings and their settings in config.json."
        )
    awq = rounding is not None and may_be_scaled(rounding)
    worst, nearest, off = 0.0, 0, None
    for number, layer, hidden, arguments_before in parent.layers():
        layer_now, changed = layers[number], None
        inputs = (hidden, arguments_before), (hidden.to(embedded.dtype), arguments[number])
        if awq and _only_rounded(layer, layer_now):
            errors = _errors(layer, layer_now, set(), *inputs, _round_linears(layer, rounding, number))
            changed = next((stem for stem, error in errors if not error <= max(KERNEL, same)), None)
            if changed is None:
                nearest += 1
                continue
        scaled = _scaled_linears(layer, parent.config) if awq else set()
        for stem, error in _errors(layer, layer_now, scaled, *inputs, {}):
            bits = 16 if rounding is None else stated_bits(rounding, number, stem)
            allowed = same if bits == 16 else for_bits(SCALED, bits) * (DOWN if stem == "mlp.down_proj" else 1)
            worst = max(worst, error)
            if error <= allowed:
                continue
            off = off or f"{_name(number, stem)} (by {error:.2g})"
            if awq or bits == 16:
                raise GateError(
                    f"{_name(number, stem)} computes something else than in the model before: on the same input its "
                    f"output is off by {error:.2g} (allowed: {allowed:g}).{_first_changed(number, changed)}"
                )
    sentences = [f"at most {worst:.2g} from the model before on the same inputs, linear by linear"] if worst else []
    sentences += [f"{nearest} of {len(layers)} layers are the model before's, rounded to nearest"] if nearest else []
    return "; ".join(sentences) or "the same as in the model before", off


def _first_changed(number: int, stem: str | None) -> str:
    return f" The first weight that is not the model before's, rounded: {_name(number, stem)}." if stem else ""


def _name(number: int, stem: str) -> str:
    return f"'language_model.model.layers.{number}.{stem}'"


def _linears(layer: nn.Module) -> list[str]:
    return [name for name, module in layer.named_modules() if isinstance(module, nn.Linear)]


@torch.no_grad()
def _only_rounded(layer: nn.Module, layer_now: nn.Module) -> bool:
    """Tell whether all parameters but the linears' weights equal those of `layer`; AWQ would have scaled a norm."""
    weights = {f"{name}.weight" for name in _linears(layer)}
    others = [(name, value) for name, value in layer.named_parameters() if name not in weights]
    return all(_relative_error(attrgetter(name)(layer_now).float(), value.float()) < EQUAL for name, value in others)


def _round_linears(layer: nn.Module, config, number: int) -> dict[str, torch.Tensor]:
    """Return the weights of a layer's linears, rounded to nearest as in the rounded checkpoint's config."""
    weights = {}
    for stem in _linears(layer):
        weight, bits = layer.get_submodule(stem).weight.detach(), stated_bits(config, number, stem)
        weights[f"{stem}.weight"] = rounded(weight, stated_group(config), bits) if bits < 16 else weight
    return weights


def _errors(
    layer: nn.Module, layer_now: nn.Module, scaled: set[str], inputs, inputs_now, weights: dict[str, torch.Tensor]
) -> Iterator[tuple[str, float]]:
    """Yield (linear, relative error of its outputs) of `layer_now` in the order they run.

    scaled: linears whose outputs are compared up to a factor each. weights: replace those of `layer`.
    """
    exact, outputs = (
        _outputs(layer, layer, scaled, *inputs, weights),
        _outputs(layer_now, layer, scaled, *inputs_now, {}),
    )
    for stem, wanted in exact.items():
        output = outputs[stem].to(wanted.device)
        yield stem, _relative_error(_fit_outputs(output, wanted) if stem in scaled else output, wanted)


@torch.inference_mode()
def _outputs(
    layer: nn.Module, like: nn.Module, scaled: set[str], hidden: torch.Tensor, arguments: dict, weights: dict
) -> dict[str, torch.Tensor]:
    """Return the outputs [T, out] of a layer's linears without their biases, in float32, in the order they run.

    The bias taken off is that of `like`, the layer of the model before; for `scaled` linears, that of `layer`.
    """
    outputs: dict[str, torch.Tensor] = {}

    def note(name: str, bias: torch.Tensor | None):
        def hook(module, args, output):
            outputs[name] = output[0].float() - (0 if bias is None else bias.float())

        return hook

    handles = []
    for name in _linears(like):
        module = layer.get_submodule(name)
        bias = getattr(module if name in scaled else like.get_submodule(name), "bias", None)
        handles.append(module.register_forward_hook(note(name, bias)))
    try:
        functional_call(layer, weights, (hidden,), arguments)
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def _scaled_linears(layer: nn.Module, config) -> set[str]:
    """Return the linears whose outputs AWQ scales."""
    supported = config.text_config.model_type in AWQ_GROUPS
    return {group.before for group in scaling_groups(layer)} & set(_linears(layer)) if supported else set()


def _fit_outputs(output: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Return `output` [T, out] with every output multiplied by its least-squares factor to `exact`."""
    return output * ((output * exact).sum(0) / output.square().sum(0).clamp(min=torch.finfo(output.dtype).tiny))


def _relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return float((value - exact).norm() / exact.norm().clamp(min=torch.finfo(exact.dtype).tiny))
