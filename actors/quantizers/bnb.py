"""bitsandbytes' NF4 (Dettmers et al. 2023) and LLM.int8 (Dettmers et al. 2022), saved for plain transformers."""

from pathlib import Path

import numpy as np
from transformers import BitsAndBytesConfig

from actors.loading import load_model, load_processor
from actors.probe import PROBE, probe_logits
from actors.quantizers.storage import rest_dtype
from actors.specs import NOT_ROUNDED, ModelSpec, QuantizeSettings
from actors.surgery import copy_companions, publish_names
from actors.trainer import nf4_config

MODULES = {"nf4": "Linear4bit", "int8": "Linear8bitLt"}


def quantize_bnb(spec: ModelSpec, source: Path, settings: QuantizeSettings, out: Path) -> None:
    """Quantize with bitsandbytes on load and save. RuntimeError: a module was rounded that must not be."""
    dtype = rest_dtype(source)
    quantization = nf4_config(dtype) if settings.method == "nf4" else int8_config()
    name = str(dtype).removeprefix("torch.")
    model = load_model(**{**vars(spec), "dtype": name}, quantization=quantization)
    rounded = [n for n, module in model.named_modules() if type(module).__name__ == MODULES[settings.method]]
    wrong = [n for n in rounded if ".language_model." not in n]
    if wrong or not rounded:
        raise RuntimeError(f"bitsandbytes rounded {wrong[:1] or 'nothing'}, but only decoder linears may be rounded.")
    copy_companions(source, out)
    model.save_pretrained(out)
    publish_names(out)
    processor = load_processor(spec.path, spec.revision, spec.trust_remote_code)
    np.save(out / PROBE, probe_logits(model, processor), allow_pickle=False)


def int8_config() -> BitsAndBytesConfig:
    """Return LLM.int8's settings (a scale per output; inputs above 6 stay in 16 bits) for the decoder's linears."""
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=NOT_ROUNDED)
