"""What the gate checks of a loaded model's linears: their kinds, and that each computes with the right weight."""

from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import torch

from actors.checkpoint.loading import language_model
from actors.checkpoint.tensors import published_name
from actors.gate.files import LAYER, tensors_of
from actors.gate.scales import Rounding, check_scales
from actors.maths.rounding import dequantize, unpack
from actors.quantizers.mixed import PARTS, group_bits, unpacked
from actors.quantizers.structure import linear_shapes, weight_bits
from actors.quantizers.table import (
    COMPRESSED_TENSORS,
    GEMM,
    SIMULATED,
    Layout,
    Method,
    find_layout,
    find_methods,
    for_bits,
)
from actors.specs import GateError

KERNEL = 2e-2  # largest relative error of a linear's output in float16, for a kernel that reads the stored numbers
# ... and of rounded weights from those before rounding, by bits (others: for_bits). Groups of 64 normal values show
# .01, .12, .25 and .57; an unrelated weight 1.4.
ROUNDED_LINEAR = {8: 0.1, 4: 0.4, 3: 0.7, 2: 1.2}
PLAIN = (torch.nn.Linear, torch.nn.modules.linear.NonDynamicallyQuantizableLinear)  # the second: SigLIP's pooling head


def quant_method(config) -> str | None:
    """Return the quant_method of a checkpoint's config, None if its weights are not packed."""
    return (getattr(config, "quantization_config", None) or {}).get("quant_method")


def layout_of(config) -> Layout | None:
    """Return the layout of a checkpoint's rounded weights; None: they are not packed, or in one not known here."""
    return find_layout(getattr(config, "quantization_config", None))


def _methods_of(config) -> list[Method]:
    """Return the methods that may have rounded a checkpoint."""
    return find_methods(getattr(config, "quantization_config", None), getattr(config, SIMULATED, None))


def check_modules(model, config) -> str:
    """Refuse a model whose decoder linears are not of the kind that the config says, or where others are rounded."""
    method, names = quant_method(config), tuple(linear_shapes(config))
    if layout_of(config) is COMPRESSED_TENSORS:
        return _check_bits(model, config)
    kinds = set()
    for name, module in model.named_modules():
        if "language_model" in name and ".layers." in name and name.endswith(names):
            kinds.add(type(module).__name__)
            if (type(module) is torch.nn.Linear) == (method is not None):
                raise GateError(
                    f"{name!r} is a {type(module).__name__}, but the config says {method or 'no quantization'}."
                )
        elif "Linear" in type(module).__name__ and type(module) not in PLAIN:
            raise GateError(f"{name!r} is a {type(module).__name__}: only the decoder's linears may be rounded.")
    simulated = ", rounded weights stored in 16 bits (simulated)" if getattr(config, SIMULATED, None) else ""
    return f"decoder linears are {', '.join(sorted(kinds))}, the rest is not rounded{simulated}"


def _check_bits(model, config) -> str:
    """Refuse linears with other bits than the config's groups say: they look plain, and carry a scheme."""
    layers = set(language_model(model).layers.modules())
    decoder = {
        module: (number, stem)
        for number, layer in enumerate(language_model(model).layers)
        for stem, module in layer.named_modules()
        if type(module) is torch.nn.Linear
    }
    counts: Counter[int] = Counter()
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        bits = scheme.weights.num_bits if scheme else 16
        if module in decoder:
            stated = group_bits(config.quantization_config, *decoder[module])
            counts[stated] += 1
            if bits != stated:
                raise GateError(f"{name!r} has {bits} bits, but the config says {stated}.")
        elif scheme or (module in layers and "Linear" in type(module).__name__):
            raise GateError(f"{name!r} is a {type(module).__name__}: only the decoder's linears may be rounded.")
    counted = ", ".join(f"{count} of {bits} bits" for bits, count in sorted(counts.items()))
    return f"decoder linears: {counted}; the rest is not rounded"


def check_linears(folder: Path, config, model, parent: Path | None) -> str | None:
    """Refuse a rounded linear that computes with another weight than it should; None: nothing to compare with.

    The weight is what the packed numbers say, unpacked here, in the layouts of AWQ and compressed-tensors. In the
    others it is `parent`'s, within the error of rounding, and with scales that are right (actors.gate.scales). AWQ
    rescales weights: see actors.gate.layers.
    """
    rounding = None
    if layout_of(config) is GEMM:
        weights, allowed, what = _unpacked(folder), KERNEL, "its stored numbers"
    elif layout_of(config) is COMPRESSED_TENSORS:
        weights, allowed, what = _iterate_packed(folder, config), KERNEL, "its stored numbers"
    elif parent is not None and _methods_of(config) and not may_be_scaled(config):
        weights, allowed = (
            _decoder_weights(parent, tuple(linear_shapes(config))),
            for_bits(ROUNDED_LINEAR, weight_bits(config, 16)),
        )
        what, rounding = "the weight before rounding", _rounding(config)
    else:
        return None
    dtype, worst, slope = model.lm_head.weight.dtype, 0.0, 0.0
    for number, stem, weight in weights:
        module = language_model(model).layers[number].get_submodule(stem)
        name = f"language_model.model.layers.{number}.{stem}"
        if rounding:
            slope = max(slope, check_scales(name, module, weight, rounding, dtype))
        error = _output_error(module, weight, dtype)
        if not error <= allowed:
            raise GateError(f"{name!r} does not compute with {what}: it is off by {error:.2g} (allowed: {allowed:g}).")
        worst = max(worst, error)
    scales = f"; their slopes are at most {slope:.2g} from 1" if rounding else ""
    return f"{worst:.2g} from {what}, linear by linear (allowed: {allowed:g}){scales}"


def _rounding(config) -> Rounding:
    """Return how the linears were rounded; where several methods share the layout, with the widest of their bounds."""
    methods, bits = _methods_of(config), weight_bits(config, 16)
    linear, block = (max(bounds) for bounds in zip(*(for_bits(each.slopes, bits) for each in methods), strict=True))
    in_groups = any(each.groups for each in methods)
    return Rounding((linear, block), stated_group(config) if in_groups else methods[0].block)


def _unpacked(folder: Path) -> Iterator[tuple[int, str, torch.Tensor]]:
    held: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
    for name, tensor in tensors_of(folder):
        if (match := LAYER.search(name)) and name.endswith((".qweight", ".qzeros", ".scales")):
            stem, _, part = match[2].rpartition(".")
            parts = held.setdefault((int(match[1]), stem), {})
            parts[part] = tensor
            if len(parts) == 3:
                q, zero = (unpack(parts[part]).T.contiguous() for part in ("qweight", "qzeros"))
                yield int(match[1]), stem, dequantize(q, zero, parts["scales"].T.contiguous())
                parts.clear()


def _iterate_packed(folder: Path, config) -> Iterator[tuple[int, str, torch.Tensor]]:
    held: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
    for name, tensor in tensors_of(folder):
        if (match := LAYER.search(name)) and name.endswith(PARTS):
            number, (stem, _, part) = int(match[1]), match[2].rpartition(".")
            parts = held.setdefault((number, stem), {})
            parts[part] = tensor
            if len(parts) == len(PARTS):
                yield number, stem, unpacked(parts, group_bits(config.quantization_config, number, stem))
                parts.clear()


def _decoder_weights(folder: Path, linears: tuple[str, ...]) -> Iterator[tuple[int, str, torch.Tensor]]:
    for name, tensor in tensors_of(folder):
        match = LAYER.search(published_name(name))
        if match and match[2].removesuffix(".weight") in linears:
            yield int(match[1]), match[2].removesuffix(".weight"), tensor


@torch.inference_mode()
def _output_error(module, weight: torch.Tensor, dtype: torch.dtype) -> float:
    """Return the relative error of a linear's outputs for random inputs of `dtype` against x W', its bias taken off."""
    x = torch.randn(4, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(dtype)
    held = next(chain(module.parameters(), module.buffers()))
    bias = getattr(module, "bias", None)
    output = module(x.to(held.device)).float() - (0 if bias is None else bias.float())
    exact = x.to(weight.device).float() @ weight.float().T
    return float((output.to(exact.device) - exact).norm() / exact.norm())


def stated_bits(config, number: int, stem: str) -> int:
    """Return the bits that a checkpoint's config gives a linear of decoder layer `number`."""
    if layout_of(config) is COMPRESSED_TENSORS:
        return group_bits(config.quantization_config, number, stem)
    return weight_bits(config, 16)


def stated_group(config) -> int:
    """Return the group size of a checkpoint that holds rounded weights in groups."""
    given = getattr(config, "quantization_config", None) or getattr(config, SIMULATED)
    groups = given.get("config_groups")
    return next(iter(groups.values()))["weights"]["group_size"] if groups else given["group_size"]


def may_be_scaled(config) -> bool:
    """Tell whether a method that rescales weights (AWQ) may have made a checkpoint: packed ones do not say."""
    return any(method.rescales for method in _methods_of(config))
