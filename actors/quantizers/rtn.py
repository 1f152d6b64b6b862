"""Round to nearest, written tensor by tensor in the AWQ gemm layout, which transformers and vLLM load."""

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoConfig

from actors.maths.rounding import gemm_tensors
from actors.specs import NOT_ROUNDED
from actors.surgery import copy_companions, iterate_tensors, local_folder, write_tensors

_LINEAR = re.compile(r"\blanguage_model\.(?:model\.)?layers\.\d+\..+\.weight$")


def quantize_rtn(path: str, out: Path, group_size: int, revision: str | None = None) -> dict:
    """Write the checkpoint at `path` with its decoder linears at 4 bits to `out`; one tensor in memory at a time.

    Returns {linears}: how many were rounded. ValueError: already quantized, or sizes that do not divide.
    """
    source = local_folder(path, revision)
    config = AutoConfig.from_pretrained(source)
    if getattr(config, "quantization_config", None):
        raise ValueError(f"{path!r} is quantized already.")
    copy_companions(source, out)
    config.quantization_config = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": NOT_ROUNDED,
    }
    for part in (config, config.text_config, config.vision_config):
        part.dtype = torch.float16  # what the tensors below are stored in
    config.save_pretrained(out)
    count = 0

    def rounded() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal count
        for name, tensor in iterate_tensors(source):
            if tensor.dim() == 2 and _LINEAR.search(name):
                count += 1
                stem = name.removesuffix("weight")
                for part, value in gemm_tensors(tensor, group_size).items():
                    yield stem + part, value
            else:
                yield name, tensor.to(torch.float16) if tensor.is_floating_point() else tensor

    write_tensors(out, rounded())
    return {"linears": count}
