"""bitsandbytes' 4-bit NormalFloat (Dettmers et al. 2023), saved so that plain transformers loads it."""

from pathlib import Path

from actors.loading import load_model
from actors.specs import ModelSpec, QuantizeSettings
from actors.surgery import copy_companions, local_folder, stored_dtype
from actors.trainer import nf4_config

BLOCK = 64


def quantize_nf4(spec: ModelSpec, settings: QuantizeSettings, out: Path) -> dict:
    """Quantize with bitsandbytes on load and save; returns {linears}.

    ValueError: a group size other than bitsandbytes' block of 64, or a module was rounded that must not be.
    """
    if settings.group_size != BLOCK:
        raise ValueError(f"nf4 has blocks of {BLOCK}; quantize.group_size is {settings.group_size}.")
    source = local_folder(spec.path, spec.revision)
    stored = stored_dtype(spec.path, spec.revision)
    model = load_model(**{**vars(spec), "dtype": str(stored).removeprefix("torch.")}, quantization=nf4_config(stored))
    rounded = [name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"]
    wrong = [name for name in rounded if "language_model" not in name]
    if wrong or not rounded:
        raise ValueError(f"bitsandbytes rounded {wrong[:1] or 'nothing'}, but only decoder linears may be rounded.")
    copy_companions(source, out)
    model.save_pretrained(out)
    return {"linears": len(rounded)}
