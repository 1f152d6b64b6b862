"""The gate: what a checkpoint must pass before it is published, tried with plain transformers in a fresh process.

Each check raises a GateError that names the first offending tensor, module or file.
"""

import gc
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForImageTextToText

from actors.checkpoint.config import read_config
from actors.checkpoint.loading import cpu_awq, load_processor, pick_device, quiet
from actors.checkpoint.tensors import stored_dtype
from actors.gate.files import LAYER, check_kept, check_names, check_sums, check_tensors, load_or_refuse
from actors.gate.layers import check_layers
from actors.gate.linears import check_linears, check_modules, layout_of, may_be_scaled, quant_method
from actors.gate.narrowed import Narrowed
from actors.gate.parent import Parent
from actors.gate.vllm import check_vllm
from actors.probe import PROBE, placed_probe, probe_logits, read_probe, write_probe
from actors.quantizers.storage import release
from actors.quantizers.structure import linear_shapes, weight_bits
from actors.quantizers.table import GEMM, for_bits
from actors.specs import Change, GateError, ModelSpec
from actors.training.parts import may_differ
from actors.training.settings import Trained

NEW_TOKENS = 8
# Largest difference of logits, relative to the reference's norm. SAME: for the same model, by compute type. ROUNDED:
# from the model before rounding, by bits (others: for_bits); with 3 and 2 bits a sound model's logits may be as far off
# as a broken one's: there only the layers decide (actors.gate.layers, actors.gate.linears).
SAME = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}
ROUNDED = {16: 2e-2, 8: 0.2, 4: 1.0, 3: float("inf"), 2: float("inf")}


class Gate:
    """Checks checkpoints; a worker class, so that it runs in a process of its own."""

    def __init__(self):
        quiet()

    def check(
        self,
        spec: ModelSpec,
        parent: ModelSpec | None = None,
        change: Change | None = None,
        removed: Sequence[int] = (),
        sums: Mapping[str, str] | None = None,
        keep_probe: bool = False,
        trained: Trained | None = None,
    ) -> dict:
        """Check the checkpoint folder `spec` and return {check: what it found}, with `sums` of the tensors.

        parent, change: what it was made from, and how; without them only the folder itself is checked. removed: the
        layers that pruning removed, zero-based. sums: SHA-256 of every tensor as first published. keep_probe: write
        the probe's logits into the folder, for later checks. trained: what a training may have changed. GateError: a
        check failed.
        """
        folder = Path(spec.path)
        trusted = spec.trust_remote_code
        config = load_or_refuse(lambda: read_config(folder, trust_remote_code=trusted))
        if quant_method(config) == "bitsandbytes":  # transformers computes with it only in the stored type
            spec = replace(spec, dtype=_name_stored_dtype(folder))
        findings: dict = {"tensors": check_tensors(folder, config)}
        findings["sums"] = check_sums(folder, sums)
        findings["names"] = check_names(folder)
        processor = load_or_refuse(lambda: load_processor(spec.path, None, trusted))
        findings["processor"] = f"{type(processor).__name__} with a chat template"
        narrowed = Narrowed(folder, parent) if parent and change is Change.NARROWED else None
        before = Parent(parent, removed, narrowed.mask if narrowed else None) if parent else None
        if before:
            _check_count(config, before)
            changed = _may_differ(config, change, trained)
            narrow = narrowed.check_tensors() if narrowed else None
            findings["kept"] = narrow or check_kept(folder, before.folder, before.renumbered, changed)
        model = load_plainly(spec, config)
        findings["modules"] = check_modules(model, config)
        logits = probe_logits(model, processor)  # the first forward pass, in which some formats are dequantized
        rounded_from = before.folder if before and change is Change.ROUNDED else None
        findings["linears"] = check_linears(folder, config, model, rounded_from) or "nothing to compare with"
        if not np.isfinite(logits).all():
            raise GateError(f"The logits of {spec.path!r} hold NaN or infinity.")
        closeness, off = [], None
        if before and change is not Change.TRAINED:
            layers, off, close = _compare_with_parent(before, model, processor, config, spec, change, logits)
            findings |= {"layers": layers} if layers else {}
            closeness.append(close)
        if (folder / PROBE).is_file():
            recorded, computed = read_probe(folder)
            types = {"float16", spec.dtype, _name_stored_dtype(folder), computed}  # some kernels compute in float16
            allowed = max(limit for dtype, limit in SAME.items() if dtype in types)
            closeness.append(_compare_logits(logits, recorded, allowed, "what it gave when it was made", off))
        findings["logits"] = "; ".join(closeness) or "no reference to compare with"
        findings["cache"] = check_cache(model, processor, _cache_error(config) or SAME[spec.dtype])
        del model, before, narrowed
        _free()
        findings["vllm"] = check_vllm(folder, config, is_ours=parent is not None or keep_probe)
        if keep_probe and not (folder / PROBE).exists():
            write_probe(folder, logits, spec.dtype)
        return findings


def _compare_with_parent(
    before: Parent, model, processor, config, spec: ModelSpec, change: Change | None, logits
) -> tuple[str | None, str | None, str]:
    """Compare a model's layers and logits [V] with those of the model before; GateError: they differ too much.

    Returns (the layers' finding, None where they have other shapes; the first linear that is off; the logits' finding).
    """
    same = SAME[spec.dtype]
    if change is Change.NARROWED:
        before.run()
        return None, None, _compare_logits(logits, before.logits(), same, "the model before, masked")
    if change is Change.PRUNED:
        layers, off = check_layers(before, model, processor, None, same)
        return layers, off, _compare_logits(logits, before.logits(), same, "the original with its layers switched off")
    layers, off = check_layers(before, model, processor, config, max(same, SAME[_name_stored_dtype(Path(spec.path))]))
    allowed = for_bits(ROUNDED, weight_bits(config, 16))
    return layers, off, _compare_logits(logits, before.logits(), allowed, "the model before rounding", off)


def _check_count(config, before: Parent) -> None:
    stated, expected = config.text_config.num_hidden_layers, len(before.renumbered)
    if stated != expected:
        raise GateError(f"config.json says {stated} decoder layers, but {expected} of the model before should be left.")


def _cache_error(config) -> float | None:
    layout = layout_of(config)
    return layout.one_by_one if layout else None


def _name_stored_dtype(folder: Path) -> str:
    return str(stored_dtype(str(folder))).removeprefix("torch.")


def _free() -> None:
    gc.collect()
    release()
    torch.cuda.empty_cache()


def _may_differ(config, change: Change | None, trained: Trained | None) -> Callable[[str], bool]:
    """Return a function from a tensor's name to whether it may differ from the model before.

    Pruning changes no tensor; training changes what was trained; rounding the decoder's linears, AWQ also norms and
    biases.
    """
    if change is Change.PRUNED:
        return lambda name: False
    if change is Change.TRAINED and trained is not None:
        return may_differ(trained, linear_shapes(config))
    if may_be_scaled(config):
        return lambda name: bool(LAYER.search(name))
    return may_differ(Trained(("lora",)), linear_shapes(config))  # the decoder's linears


def load_plainly(spec: ModelSpec, config):
    """Load the folder with plain transformers; refuse weights that are missing, unexpected or of another shape."""
    device = pick_device()
    layout = layout_of(config)
    if layout and layout.reader:
        importlib.import_module(layout.reader)
    extra = {"quantization_config": cpu_awq(config.quantization_config)} if device == "cpu" and layout is GEMM else {}
    model, info = load_or_refuse(
        lambda: AutoModelForImageTextToText.from_pretrained(
            spec.path,
            dtype=getattr(torch, spec.dtype),
            device_map={"": device},
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # the loading info then names them
            trust_remote_code=spec.trust_remote_code,
            **extra,
        )
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        for entry in sorted(info[kind], key=str):
            name, *shapes = (entry,) if isinstance(entry, str) else entry
            sizes = f" ({list(shapes[0])} in the files, {list(shapes[1])} by config.json)" if shapes else ""
            raise GateError(f"transformers finds {kind.removesuffix('_keys')} weights, the first is {name!r}{sizes}.")
    return model.eval()


def _compare_logits(
    logits: np.ndarray, reference: np.ndarray, tolerance: float, what: str, off: str | None = None
) -> str:
    if logits.shape != reference.shape:
        raise GateError(f"There are {len(logits)} logits, but {len(reference)} of {what}.")
    error = float(np.linalg.norm(logits - reference)) / (float(np.linalg.norm(reference)) or 1.0)
    allowed = "any" if tolerance == float("inf") else f"{tolerance:g}"
    if not error <= tolerance:
        first = f" The first linear whose output is off: {off}." if off else ""
        raise GateError(f"The logits differ from {what} by {error:.2g} of their norm (allowed: {allowed}).{first}")
    return f"{error:.2g} from {what} (allowed: {allowed})"


@torch.inference_mode()
def check_cache(model, processor, tolerance: float) -> str:
    """Refuse a model whose greedy answer depends on the key/value cache by more than rounding.

    At the first token that differs, the logits may be up to `tolerance` times the largest one apart; the two tokens'
    logits are then at most twice that apart, since each answer prefers its own.
    """
    inputs = placed_probe(model, processor)
    start = inputs["input_ids"].shape[1]
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    cached, plain = (model.generate(**inputs, **options, use_cache=use) for use in (True, False))
    pairs = zip(cached.sequences[0, start:].tolist(), plain.sequences[0, start:].tolist(), strict=False)
    place = next((i for i, (cached_token, plain_token) in enumerate(pairs) if cached_token != plain_token), None)
    if place is None:
        return f"{plain.sequences.shape[1] - start} tokens are the same with and without it"
    cached_logits, plain_logits = (answer.logits[place][0].float() for answer in (cached, plain))
    apart, allowed = float((cached_logits - plain_logits).abs().max()), tolerance * float(plain_logits.abs().max())
    if not apart <= allowed:
        raise GateError(
            f"Generation with the cache differs from generation without it at new token {place}: the logits are up to "
            f"{apart:.2g} apart (allowed: {allowed:.2g})."
        )
    return f"the same up to a tie at new token {place} (logits {apart:.2g} apart, allowed: {allowed:.2g})"
