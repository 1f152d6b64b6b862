"""What a fine-tuning may change: adapters on the decoder's linears, the projector, the norms, or all but the tower."""

import re
from collections.abc import Callable, Collection, Iterable, Iterator

from torch import nn

from actors.checkpoint.loading import language_model
from actors.specs import Llava
from actors.training.settings import ADAPTERS, PATCH

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


def may_differ(parts: Collection[str], linears: Iterable[str]) -> Callable[[str], bool]:
    """Return a function from a tensor's published name to whether training `parts` may have changed it.

    linears: the linears of one decoder layer, as named in it.
    """
    linears = list(linears)
    names = "|".join(map(re.escape, linears))
    adapted = re.compile(rf"^language_model\.model\.layers\.\d+\.({names})\.(?!bias$)")
    last = [name for name in linears if name.startswith("mlp.")][-1]
    patched = re.compile(rf"^language_model\.model\.layers\.\d+\.{re.escape(last)}\.")

    def differs(name: str) -> bool:
        in_language_model = name.startswith("language_model.")
        return (
            (bool({"projector", "all"} & set(parts)) and name.startswith("multi_modal_projector."))
            or ("all" in parts and in_language_model)
            or ("norms" in parts and in_language_model and bool(_NORM.search(name)))
            or (bool(set(ADAPTERS) & set(parts)) and bool(adapted.match(name)))
            or (PATCH in parts and bool(patched.match(name)))
        )

    return differs
