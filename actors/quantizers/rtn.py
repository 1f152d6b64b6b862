"""Round to nearest, written tensor by tensor: at 4 bits in the AWQ gemm layout, else as simulated weights.

The layout is what transformers (with gptqmodel) and vLLM load. With 2, 3 or 8 bits its readers disagree on the order
of values in a word, so those weights are stored rounded in 16 bits, and config.json says so.
"""

from collections.abc import Iterator
from pathlib import Path

import torch

from actors.checkpoint.tensors import iterate_tensors
from actors.maths.awq import rounded
from actors.maths.rounding import gemm_tensors
from actors.quantizers.storage import write_rounded
from actors.quantizers.table import GEMM, SIMULATED
from actors.specs import NOT_ROUNDED, QuantizeSettings


def quantize_rtn(source: Path, config, settings: QuantizeSettings, out: Path) -> None:
    """Write the checkpoint `source` with its decoder linears rounded to `out`; one tensor in memory at a time."""
    write_gemm(source, config, settings, out, iterate_tensors(source))


def write_gemm(
    source: Path, config, settings: QuantizeSettings, out: Path, tensors: Iterator[tuple[str, torch.Tensor]]
) -> None:
    """Round `tensors`, which replace those of `source`, and write the checkpoint to `out`."""

    def pack_weight(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        if settings.simulated:
            return {"weight": rounded(weight, settings.group_size, settings.bits).to(torch.float16)}
        return gemm_tensors(weight, settings.group_size)

    facts = {"bits": settings.bits, "group_size": settings.group_size}
    if settings.simulated:
        setattr(config, SIMULATED, {"method": settings.method, **facts})
    else:
        config.quantization_config = {
            **GEMM.marks,
            **facts,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": NOT_ROUNDED,
        }
    write_rounded(source, out, config, torch.float16, tensors, pack_weight)
