"""The gate: what a checkpoint must pass before it is published, tried with plain transformers in a fresh process.

Each check raises a GateError that names the first offending tensor, module or file.
"""

import hashlib
import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from actors.loading import PARTS, cpu_awq, language_model, load_processor, pick_device, quiet
from actors.maths.rounding import dequantize, unpack
from actors.probe import PROBE, engine_logits, placed_probe, probe_logits
from actors.quantizers.structure import SIMULATED, linear_shapes
from actors.specs import HQQ_CHECKPOINT, ModelSpec
from actors.surgery import iterate_tensors

NEW_TOKENS = 8
# Largest difference of logits, relative to the reference's norm, by compute type; and for rounded weights against the
# model before rounding, where it only tells a rounded model from a broken one (a model that answers 0 has 1).
SAME = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}
ROUNDED = 1.0
PUBLISHED = re.compile(
    r"^(language_model\.(model\.(embed_tokens|norm|final_layernorm|layers\.\d+)\b|lm_head\.)"
    r"|vision_tower\.vision_model\.|multi_modal_projector\.)"
)
LAYER = re.compile(r"language_model\.(?:model\.)?layers\.(\d+)\.(.+)$")
VLLM_TEXTS = ("llama", "mistral", "qwen2", "phi")


class GateError(ValueError):
    """A checkpoint that must not be published, and why."""


class Gate:
    """Checks checkpoints; a worker class, so that it runs in a process of its own."""

    def __init__(self):
        quiet()

    def check(
        self,
        spec: ModelSpec,
        parent: ModelSpec | None = None,
        removed: Sequence[int] | None = None,
        sums: Mapping[str, str] | None = None,
        keep_probe: bool = False,
    ) -> dict:
        """Check the checkpoint folder `spec` and return {check: what it found}, with `sums` of the tensors.

        removed: the checkpoint is `parent` without these layers, whose logits it must give. parent without removed: it
        is `parent` with rounded weights. sums: SHA-256 of every tensor as first published. keep_probe: write what the
        probe gave into the folder, for later checks. GateError: a check failed.
        """
        folder = Path(spec.path)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=spec.trust_remote_code)
        found: dict = {"tensors": check_tensors(folder, config)}
        found["sums"] = check_sums(folder, sums)
        found["names"] = check_names(folder)
        processor = _checked(lambda: load_processor(spec.path, None, spec.trust_remote_code))
        found["processor"] = f"{type(processor).__name__} with a chat template"
        expected = None
        if parent is not None:
            expected = engine_logits(parent, removed or ())
        model = load_plainly(spec, config)
        found["modules"] = check_modules(model, config)
        logits = probe_logits(model, processor)
        if not np.isfinite(logits).all():
            raise GateError(f"The logits of {spec.path!r} hold NaN or infinity.")
        found["logits"] = self._compare(spec, folder, config, model, logits, expected, removed)
        found["cache"] = check_cache(model, processor, SAME[spec.dtype])
        found["vllm"] = check_vllm(folder, config)
        if keep_probe and not (folder / PROBE).exists():
            np.save(folder / PROBE, logits, allow_pickle=False)
        return found

    def _compare(self, spec, folder, config, model, logits, expected, removed) -> str:
        said, same = [], SAME[spec.dtype]
        if expected is not None and removed is not None:
            said.append(_close(logits, expected, same, "the original with its layers switched off"))
        elif expected is not None:
            said.append(_close(logits, expected, ROUNDED, "the model before rounding"))
        if (folder / PROBE).is_file():
            kept = np.load(folder / PROBE, allow_pickle=False)
            said.append(_close(logits, kept, max(same, SAME["float16"]), "what it gave when it was made"))
        method = (getattr(config, "quantization_config", None) or {}).get("quant_method")
        if method == "awq":
            said.append(check_stored_numbers(folder, model))
        return "; ".join(said) or "no reference to compare with"


def check_tensors(folder: Path, config) -> str:
    """Refuse tensors that are not numbers, and decoder layers that are not 0..n-1 with n as the config says."""
    layers: dict[int, set[str]] = {}
    count = 0
    for name, tensor in _checked_tensors(folder):
        count += 1
        if tensor.is_floating_point() and not torch.isfinite(tensor.sum(dtype=torch.float64)):
            raise GateError(f"{name!r} holds NaN or infinity.")
        if match := LAYER.search(name):
            layers.setdefault(int(match[1]), set()).add(match[2])
    said = config.text_config.num_hidden_layers
    if sorted(layers) != list(range(said)):
        odd = min(set(layers) ^ set(range(said)))
        raise GateError(
            f"config.json says {said} decoder layers, the files hold {len(layers)}: the first that does not fit is "
            f"'language_model.model.layers.{odd}'. The layers must be renumbered and the count corrected."
        )
    for number, parts in layers.items():
        for part in sorted(parts ^ layers[0]):
            raise GateError(
                f"'language_model.model.layers.{number}.{part}' is in one decoder layer and not in another."
            )
    kinds = getattr(config.text_config, "layer_types", None)
    if kinds and len(kinds) != said:
        raise GateError(f"config.json says {said} decoder layers and {len(kinds)} layer_types.")
    return f"{count} finite tensors, {said} decoder layers"


def _checked_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        yield from iterate_tensors(folder)
    except ValueError as error:
        raise GateError(str(error)) from None


def check_sums(folder: Path, known: Mapping[str, str] | None) -> dict[str, str]:
    """Return the SHA-256 of every tensor's bytes; refuse one that is not what `known` says."""
    sums = {}
    for name, tensor in iterate_tensors(folder):
        sums[name] = hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
    if known is not None:
        for name in sorted(set(known) | set(sums)):
            if known.get(name) != sums.get(name):
                other = next((n for n, s in known.items() if s == sums.get(name)), None)
                state = "missing" if name not in sums else "new" if name not in known else "not what was published"
                raise GateError(f"{name!r} is {state}{f' (it holds {other!r})' if other else ''}.")
    return sums


def check_names(folder: Path) -> str:
    """Refuse tensor names other than those of the published llava-hf checkpoints, which other programs expect."""
    for name, _ in iterate_tensors(folder):
        if not PUBLISHED.match(name):
            raise GateError(f"{name!r} is not a published llava-hf name: other programs will not find it.")
    return "as published by llava-hf"


def load_plainly(spec: ModelSpec, config):
    """Load the folder with plain transformers; refuse weights that are missing, unexpected or of another shape."""
    device = pick_device()
    stored = getattr(config, "quantization_config", None) or {}
    if stored.get("quant_method") == HQQ_CHECKPOINT:  # transformers has no loader for it: ours registers one
        import actors.quantizers.hqq  # noqa: F401
    extra = {"quantization_config": cpu_awq(stored)} if device == "cpu" and stored.get("quant_method") == "awq" else {}
    model, info = _checked(
        lambda: AutoModelForImageTextToText.from_pretrained(
            spec.path,
            dtype=getattr(torch, spec.dtype),
            device_map={"": device},
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=spec.trust_remote_code,
            **extra,
        )
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        for name in sorted(map(str, info[kind])):
            raise GateError(f"transformers finds {kind.replace('_keys', '')} weights, the first is {name!r}.")
    return model.eval()


def _checked(load: Callable):
    try:
        return load()
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise GateError(f"It cannot be loaded: {' '.join(str(error).split())[:300]}") from error


def check_modules(model, config) -> str:
    """Refuse a model whose decoder linears are not of the kind that the config says, or where others are rounded."""
    method = (getattr(config, "quantization_config", None) or {}).get("quant_method")
    names = tuple(linear_shapes(config))
    kinds = set()
    for name, module in model.named_modules():
        inside = "language_model" in name and ".layers." in name and name.endswith(names)
        if inside:
            kinds.add(type(module).__name__)
            if (type(module) is torch.nn.Linear) == (method is not None):
                raise GateError(
                    f"{name!r} is a {type(module).__name__}, but the config says {method or 'no quantization'}."
                )
        elif any(part in name for part in (*PARTS, "lm_head")) and isinstance(module, torch.nn.Linear):
            if type(module) is not torch.nn.Linear:
                raise GateError(f"{name!r} is a {type(module).__name__}: only the decoder's linears may be rounded.")
        elif "Linear" in type(module).__name__ and type(module) is not torch.nn.Linear:
            raise GateError(f"{name!r} is a {type(module).__name__}: only the decoder's linears may be rounded.")
    simulated = ", rounded weights stored in 16 bits (simulated)" if getattr(config, SIMULATED, None) else ""
    return f"decoder linears are {', '.join(sorted(kinds))}, the rest is not rounded{simulated}"


def _close(logits: np.ndarray, reference: np.ndarray, tolerance: float, what: str) -> str:
    if logits.shape != reference.shape:
        raise GateError(f"The logits are {len(logits)}, those of {what} {len(reference)}.")
    error = float(np.linalg.norm(logits - reference)) / (float(np.linalg.norm(reference)) or 1.0)
    if not error <= tolerance:
        raise GateError(f"The logits differ from {what} by {error:.2g} of their norm (allowed: {tolerance:g}).")
    return f"{error:.2g} from {what} (allowed: {tolerance:g})"


@torch.inference_mode()
def check_stored_numbers(folder: Path, model) -> str:
    """Refuse an AWQ linear that does not compute with the numbers in the files, unpacked without its kernels."""
    stored: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
    for name, tensor in iterate_tensors(folder):
        if (match := LAYER.search(name)) and name.endswith((".qweight", ".qzeros", ".scales")):
            stem, _, part = match[2].rpartition(".")
            stored.setdefault((int(match[1]), stem), {})[part] = tensor
    worst = 0.0
    for (number, stem), parts in stored.items():
        module = language_model(model).layers[number].get_submodule(stem)
        q, zero, scale = (parts[part] for part in ("qweight", "qzeros", "scales"))
        weight = dequantize(unpack(q).T.contiguous(), unpack(zero).T.contiguous(), scale.T.contiguous())
        dtype = next(tensor.dtype for tensor in model.lm_head.parameters())
        x = torch.randn(4, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(dtype)
        bias = getattr(module, "bias", None)
        found = module(x.to(model.lm_head.weight.device)).float().cpu() - (0 if bias is None else bias.float().cpu())
        exact = x.float() @ weight.T
        error = float((found - exact).norm() / exact.norm())
        if not error <= SAME["float16"]:
            name = f"language_model.model.layers.{number}.{stem}"
            raise GateError(f"{name!r} does not compute with its stored numbers: it is off by {error:.2g}.")
        worst = max(worst, error)
    return f"{worst:.2g} from its stored numbers, linear by linear (allowed: {SAME['float16']:g})"


@torch.inference_mode()
def check_cache(model, processor, tolerance: float) -> str:
    """Refuse a model whose greedy answer depends on the key/value cache, ties within the tolerance apart."""
    inputs = placed_probe(model, processor)
    start = inputs["input_ids"].shape[1]
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    cached = model.generate(**inputs, **options, use_cache=True)[0, start:].tolist()
    plain = model.generate(**inputs, **options, use_cache=False)[0, start:].tolist()
    if cached == plain:
        return f"{len(plain)} tokens are the same with and without it"
    place = next(i for i, (a, b) in enumerate(zip(cached, plain, strict=False)) if a != b)
    ids = torch.tensor([plain[:place]], device=inputs["input_ids"].device, dtype=torch.long)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    logits = model(**inputs).logits[0, -1].float()
    gap = float((logits[cached[place]] - logits[plain[place]]).abs() / logits.norm())
    if gap > tolerance:
        raise GateError(f"Generation with the cache differs from generation without it at new token {place}.")
    return f"the same up to a tie at new token {place}"


def check_vllm(folder: Path, config) -> str:
    """Compare the config with what vLLM documents for LLaVA, and load it there where vLLM is installed."""
    if config.architectures != ["LlavaForConditionalGeneration"]:
        raise GateError(
            f"config.json names the architectures {config.architectures}, not LlavaForConditionalGeneration."
        )
    if config.text_config.model_type not in VLLM_TEXTS:
        return f"not run; text model {config.text_config.model_type!r} is not one that vLLM is known to take"
    stored = getattr(config, "quantization_config", None) or {}
    if stored.get("quant_method") == HQQ_CHECKPOINT:
        return "not run; vLLM does not read this format"
    if importlib.util.find_spec("vllm") is None:
        return "not run (vLLM is not installed); the layout is the documented one"
    from vllm import LLM

    LLM(model=str(folder), max_model_len=1024, enforce_eager=True)
    return "loaded"
