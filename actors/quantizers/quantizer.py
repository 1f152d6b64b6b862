"""One interface for all quantization methods."""

from collections.abc import Sequence
from pathlib import Path

from actors.loading import quiet
from actors.specs import Conversation, ModelSpec, QuantizeSettings


class Quantizer:
    """Quantizes checkpoints, whatever the method."""

    def __init__(self):
        quiet()

    def quantize(
        self, spec: ModelSpec, settings: QuantizeSettings, calibration: Sequence[Conversation], out: str
    ) -> dict:
        """Write the 4-bit checkpoint of `spec` to `out` and return facts about it.

        `calibration` (training split only) is read by AWQ alone. ValueError: the method cannot do this.
        """
        if settings.method == "rtn":
            from actors.quantizers.rtn import quantize_rtn

            return quantize_rtn(spec.path, Path(out), settings.group_size, spec.revision)
        if settings.method == "nf4":
            from actors.quantizers.nf4 import quantize_nf4

            return quantize_nf4(spec, settings, Path(out))
        if settings.method == "awq":
            from actors.quantizers.awq import quantize_awq

            return quantize_awq(spec, settings, calibration, Path(out))
        raise ValueError(f"Unknown quantizer {settings.method!r}: choose awq, nf4 or rtn.")
