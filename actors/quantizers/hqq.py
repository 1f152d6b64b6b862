"""Half-quadratic quantization (Badri and Shaji 2023) by the hqq library, one tensor at a time, without calibration.

HQQLinear rounds; the file layout is our own: a decoder linear's `weight` holds its packed numbers, flat, with `scale`
and `zero` beside it. Only actors.checkpoint.loading.load_model reads it, through the quantizer that this module
registers. Plain transformers stops with an error about the shape of such weights (its own support for hqq does not load
LLaVA with today's versions).

HQQ's zero point is a real number, so a weight of 0 is not exact. Where a few input channels are very large and their
weights very small, these weights share an offset, which the large inputs amplify: there HQQ loses more than RTN.
"""

from pathlib import Path

import torch
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from actors.checkpoint.tensors import iterate_tensors
from actors.maths.sizes import HQQ_ROWS
from actors.quantizers.storage import rest_dtype, write_rounded
from actors.quantizers.table import HQQ
from actors.specs import QuantizeSettings

MISSING = (
    "hqq checkpoints are made and read with the hqq package, which is not installed: pip install hqq==0.2.8.post1 "
    "(or choose --quantize.method nf4, awq or rtn)."
)


def quantize_hqq(source: Path, config, settings: QuantizeSettings, out: Path) -> None:
    """Write the checkpoint `source` with its decoder linears rounded to `out`. ValueError: hqq is missing."""
    hqq = _library()
    dtype = rest_dtype(source)
    options = hqq.BaseQuantizeConfig(nbits=settings.bits, group_size=settings.group_size, axis=1)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def parts(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        linear = hqq.HQQLinear.from_weights(weight.to(device), None, options, compute_dtype=dtype, device=device)
        tensors = {"weight": linear.W_q.data.flatten(), "scale": linear.meta["scale"], "zero": linear.meta["zero"]}
        return {name: tensor.cpu() for name, tensor in tensors.items()}

    config.quantization_config = {
        **HQQ.marks,
        "bits": settings.bits,
        "group_size": settings.group_size,
        "dtype": str(dtype).removeprefix("torch."),
    }
    write_rounded(source, out, config, dtype, iterate_tensors(source), parts)


def _library():
    try:
        from hqq.core import quantize
    except ImportError as error:
        raise ValueError(f"{MISSING} ({error})") from None
    return quantize


class HqqLinear(nn.Module):
    """A linear whose weight is stored as hqq packs it, and dequantized by hqq at every use."""

    def __init__(self, linear: nn.Linear, bits: int, group_size: int, dtype: torch.dtype):
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        groups = linear.weight.numel() // group_size
        packed = torch.int32 if bits == 3 else torch.uint8
        self.register_buffer("weight", torch.empty(-(-groups // HQQ_ROWS[bits]) * group_size, dtype=packed))
        self.register_buffer("scale", torch.empty(groups, 1, dtype=dtype))
        self.register_buffer("zero", torch.empty(groups, 1, dtype=dtype))
        self._quantizer = _library().Quantizer
        self._meta = {
            "nbits": bits,
            "group_size": group_size,
            "shape": linear.weight.shape,
            "axis": 1,
            "packing": self._quantizer.bit_to_packing[bits],
            "view_as_float": False,
            "compute_dtype": dtype,
        }

    def dequantize(self) -> torch.Tensor:
        """Return (q - zero) * scale, [out, in], in the 16-bit type of the scales."""
        packed = self.weight.view(-1, self._meta["group_size"])
        return self._quantizer.dequantize(packed, {**self._meta, "scale": self.scale, "zero": self.zero})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W' + b in x's type."""
        return nn.functional.linear(x, self.dequantize().to(x.dtype), self.bias)


@register_quantization_config(HQQ.marks["quant_method"])
class HqqCheckpointConfig(QuantizationConfigMixin):
    """The quantization_config of a checkpoint in this layout."""

    def __init__(self, bits: int, group_size: int, dtype: str, **_):
        self.quant_method = HQQ.marks["quant_method"]
        self.bits, self.group_size, self.dtype = bits, group_size, dtype


@register_quantizer(HQQ.marks["quant_method"])
class HqqCheckpointQuantizer(HfQuantizer):
    """Replaces the decoder's linears by modules into which transformers' loader puts the stored tensors."""

    requires_calibration = True  # that is: only stored weights are loaded, none are rounded

    def _process_model_before_weight_loading(self, model, **kwargs):
        settings = self.quantization_config
        dtype = getattr(torch, settings.dtype)
        layers = model.model.language_model.layers
        linears = [(name, module) for name, module in layers.named_modules() if isinstance(module, nn.Linear)]
        for name, module in linears:
            with torch.device("meta"):
                layers.set_submodule(name, HqqLinear(module, settings.bits, settings.group_size, dtype))

    def is_serializable(self) -> bool:
        """Refuse to save a loaded model: the checkpoint's files are there already."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Adapters on such a model are not supported."""
        return False
