"""What a fine-tuning may change: adapters on the decoder's linears, the projector, the norms, or all but the tower."""

import re
from collections.abc import Callable, Collection, Iterable, Iterator

from torch import nn

from actors.checkpoint.loading import language_model
from actors.checkpoint.tensors import published_layer
from actors.specs import Llava
from actors.training.settings import ADAPTERS, PATCH, Trained

_NORM = re.compile(r"norm\.(weight|bias)$")


def language_linears(model: Llava) -> list[str]:
    """Return the full names of the decoder layers' linears: what LoRA adapts and quantizers round."""
    layers = language_model(model).layers
    linears = {id(module) for module in layers.modules() if isinstance(module, nn.Linear)}
    return [name for name, module in model.named_modules() if id(module) in linears]


def adapted_linears(model: Llava, targets: Collection[str]) -> list[str]:
    """Return the linears that get an adapter: all, or those whose last name is in `targets`.

    ValueError: a target that no linear has.
    """
    linears = language_linears(model)
    names = {name.rsplit(".", 1)[1] for name in linears}
    for target in targets:
        if target not in names:
            raise ValueError(f"recover.targets names {target!r}: this model's linears are {', '.join(sorted(names))}.")
    return [name for name in linears if not targets or name.rsplit(".", 1)[1] in targets]


def trained_weights(model: Llava, parts: Collection[str]) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield (name in the model, weight) of what is trained itself, not through an adapter."""
    modules: list[nn.Module] = []
    if {"projector", "all"} & set(parts):
        modules.append(model.model.multi_modal_projector)
    if "all" in parts:
        modules += [language_model(model), model.lm_head]
    if "norms" in parts:
        modules += [module for module in language_model(model).modules() if "Norm" in type(module).__name__]
    chosen = {id(parameter) for module in modules for parameter in module.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) in chosen:
            yield name, parameter


def may_differ(trained: Trained, linears: Iterable[str]) -> Callable[[str], bool]:
    """Return a function from a tensor's published name to whether the training may have changed it.

    linears: the linears of one decoder layer, as named in it.
    """
    parts, linears = set(trained.parts), list(linears)
    adapted = {name for name in linears if not trained.targets or name.rsplit(".", 1)[1] in trained.targets}
    last = [name for name in linears if name.startswith("mlp.")][-1]

    def differs(name: str) -> bool:
        if name.startswith("multi_modal_projector."):
            return bool({"projector", "all"} & parts)
        if not name.startswith("language_model."):
            return False
        if "all" in parts or ("norms" in parts and _NORM.search(name)):
            return True
        if (place := published_layer(name)) is None:
            return False
        number, (linear, _, kind) = place[0], place[1].rpartition(".")
        if PATCH in parts and linear == last and (trained.layers is None or number in trained.layers):
            return True
        return bool(set(ADAPTERS) & parts) and kind != "bias" and _is_of(place[1], adapted)

    return differs


def _is_of(name: str, linears: Collection[str]) -> bool:
    """Tell whether a tensor belongs to one of the linears, however their weights are stored."""
    return any(name.startswith(f"{linear}.") for linear in linears)
