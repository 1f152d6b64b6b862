"""Declares torchvision's operators, in .venv-vllm: PyPI's torchvision is built for CUDA and stops at a torch for CPUs.

vLLM imports torchvision with LLaVA, but calls none of these operators.
"""

import torch

OPERATORS = (
    *("nms", "qnms", "roi_align", "_roi_align_backward", "qroi_align", "roi_pool", "_roi_pool_backward"),
    *("ps_roi_align", "_ps_roi_align_backward", "ps_roi_pool", "_ps_roi_pool_backward"),
    *("deform_conv2d", "_deform_conv2d_backward"),
)
LIBRARY = torch.library.Library("torchvision", "DEF")
for name in OPERATORS:
    LIBRARY.define(f"{name}(Tensor unused) -> Tensor")
