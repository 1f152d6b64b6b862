"""bitsandbytes' NF4 (Dettmers et al. 2023) and LLM.int8 (Dettmers et al. 2022), written one tensor at a time.

bitsandbytes rounds; the files equal those that transformers saves after rounding a whole model in memory.
"""

from pathlib import Path

import torch
from bitsandbytes.functional import int8_vectorwise_quant, quantize_4bit
from transformers import BitsAndBytesConfig

from actors.checkpoint.tensors import iterate_tensors
from actors.quantizers.storage import rest_dtype, write_rounded
from actors.quantizers.table import NF4_BLOCK
from actors.specs import NOT_ROUNDED, QuantizeSettings
from actors.training.trainer import nf4_config


def quantize_bnb(source: Path, config, settings: QuantizeSettings, out: Path) -> None:
    """Write the checkpoint `source` with its decoder linears rounded to `out`."""
    dtype, device = rest_dtype(source), "cuda" if torch.cuda.is_available() else "cpu"
    nf4 = settings.method == "nf4"

    def parts(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        tensors = _nf4(weight.to(device, dtype)) if nf4 else _int8(weight.to(device, torch.float16))
        return {name: tensor.cpu() for name, tensor in tensors.items()}

    config.quantization_config = (nf4_config(dtype) if nf4 else int8_config()).to_dict()
    write_rounded(source, out, config, dtype, iterate_tensors(source), parts)


def _nf4(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    packed, state = quantize_4bit(weight, blocksize=NF4_BLOCK, quant_type="nf4")
    return {"weight": packed, **{f"weight.{key}": tensor for key, tensor in state.as_dict(packed=True).items()}}


def _int8(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    rounded, scales, _ = int8_vectorwise_quant(weight)
    row_major = torch.tensor(0, dtype=torch.uint8)
    return {"weight": rounded, "SCB": scales, "weight_format": row_major}


def int8_config() -> BitsAndBytesConfig:
    """Return LLM.int8's settings (a scale per output; inputs above 6 stay in 16 bits) for the decoder's linears."""
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=NOT_ROUNDED)
