"""The gate: what a checkpoint must pass before it is published, tried with plain transformers in a fresh process.

Each check raises a GateError that names the first offending tensor, module or file.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from actors.gate_files import check_names, check_sums, check_tensors, loaded
from actors.gate_linears import check_linears, check_modules, quant_method
from actors.loading import cpu_awq, load_processor, pick_device, quiet
from actors.probe import PROBE, engine_logits, placed_probe, probe_logits
from actors.quantizers.structure import weight_bits
from actors.specs import HQQ_CHECKPOINT, PACKED_CHECKPOINT, GateError, ModelSpec
from actors.surgery import local_folder, stored_dtype

NEW_TOKENS = 8
# Largest difference of logits, relative to the reference's norm: of the same model, by compute type; and of a rounded
# model from the one before rounding, by bits. With 3 and 2 bits a sound model may answer as far away as a broken one.
SAME = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}
ROUNDED = {8: 0.2, 4: 1.0, 3: float("inf"), 2: float("inf")}
VLLM_TEXTS = ("llama", "mistral", "qwen2", "phi")
VLLM_BITS = (4, 8)  # with zero points


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
        config = loaded(lambda: AutoConfig.from_pretrained(folder, trust_remote_code=spec.trust_remote_code))
        if quant_method(config) == "bitsandbytes":  # transformers computes with it in the stored type alone
            spec = replace(spec, dtype=str(stored_dtype(spec.path)).removeprefix("torch."))
        found: dict = {"tensors": check_tensors(folder, config)}
        found["sums"] = check_sums(folder, sums)
        found["names"] = check_names(folder)
        processor = loaded(lambda: load_processor(spec.path, None, spec.trust_remote_code))
        found["processor"] = f"{type(processor).__name__} with a chat template"
        expected = engine_logits(parent, removed or ()) if parent else None
        model = load_plainly(spec, config)
        found["modules"] = check_modules(model, config)
        before = local_folder(parent.path, parent.revision) if parent and removed is None else None
        logits = probe_logits(model, processor)  # the first forward pass: some formats are unpacked in it
        found["linears"] = check_linears(folder, config, model, before) or "nothing to compare with"
        if not np.isfinite(logits).all():
            raise GateError(f"The logits of {spec.path!r} hold NaN or infinity.")
        said, same = [], SAME[spec.dtype]
        if expected is not None and removed is not None:
            said.append(_close(logits, expected, same, "the original with its layers switched off"))
        elif expected is not None:
            said.append(_close(logits, expected, ROUNDED[weight_bits(config, 16)], "the model before rounding"))
        if (folder / PROBE).is_file():
            kept = np.load(folder / PROBE, allow_pickle=False)
            said.append(_close(logits, kept, max(same, SAME["float16"]), "what it gave when it was made"))
        found["logits"] = "; ".join(said) or "no reference to compare with"
        found["cache"] = check_cache(model, processor, same)
        found["vllm"] = check_vllm(folder, config)
        if keep_probe and not (folder / PROBE).exists():
            np.save(folder / PROBE, logits, allow_pickle=False)
        return found


def load_plainly(spec: ModelSpec, config):
    """Load the folder with plain transformers; refuse weights that are missing, unexpected or of another shape."""
    device = pick_device()
    method = quant_method(config)
    if method == HQQ_CHECKPOINT:  # transformers has no loader for it: ours registers one
        import actors.quantizers.hqq  # noqa: F401
    extra = {"quantization_config": cpu_awq(config.quantization_config)} if (device, method) == ("cpu", "awq") else {}
    model, info = loaded(
        lambda: AutoModelForImageTextToText.from_pretrained(
            spec.path,
            dtype=getattr(torch, spec.dtype),
            device_map={"": device},
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the loading info then, by name
            trust_remote_code=spec.trust_remote_code,
            **extra,
        )
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        for found in sorted(info[kind], key=str):
            name, *shapes = (found,) if isinstance(found, str) else found
            sizes = f" ({list(shapes[0])} in the files, {list(shapes[1])} by config.json)" if shapes else ""
            raise GateError(f"transformers finds {kind.removesuffix('_keys')} weights, the first is {name!r}{sizes}.")
    return model.eval()


def _close(logits: np.ndarray, reference: np.ndarray, tolerance: float, what: str) -> str:
    if logits.shape != reference.shape:
        raise GateError(f"The logits are {len(logits)}, those of {what} {len(reference)}.")
    error = float(np.linalg.norm(logits - reference)) / (float(np.linalg.norm(reference)) or 1.0)
    allowed = "any" if tolerance == float("inf") else f"{tolerance:g}"
    if not error <= tolerance:
        raise GateError(f"The logits differ from {what} by {error:.2g} of their norm (allowed: {allowed}).")
    return f"{error:.2g} from {what} (allowed: {allowed})"


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
    if quant_method(config) == HQQ_CHECKPOINT:
        return "not run; vLLM does not read this format"
    if quant_method(config) == PACKED_CHECKPOINT and weight_bits(config, 16) not in VLLM_BITS:
        return f"not run; of this format vLLM reads 4 and 8 bits, and there are {weight_bits(config, 16)}"
    if importlib.util.find_spec("vllm") is None:
        return "not run (vLLM is not installed); the layout is the documented one"
    from vllm import LLM

    LLM(model=str(folder), max_model_len=1024, enforce_eager=True)
    return "loaded"
