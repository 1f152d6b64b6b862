"""One interface for all quantization methods."""

from collections.abc import Sequence
from pathlib import Path

from transformers import AutoConfig

from actors.loading import quiet
from actors.quantizers.storage import check_rounded
from actors.quantizers.structure import check_quantizable
from actors.specs import Conversation, ModelSpec, QuantizeSettings
from actors.surgery import local_folder


class Quantizer:
    """Quantizes checkpoints, whatever the method."""

    def __init__(self):
        quiet()

    def quantize(
        self, spec: ModelSpec, settings: QuantizeSettings, calibration: Sequence[Conversation], out: str
    ) -> dict:
        """Write the checkpoint of `spec` with its decoder linears rounded to `out` and return facts about it.

        `calibration` (training split only) is read by AWQ alone. The facts are those of
        actors.quantizers.storage.check_rounded, and AWQ's calibration_tokens. ValueError: the method cannot do this.
        """
        source, target = local_folder(spec.path, spec.revision), Path(out)
        config = AutoConfig.from_pretrained(source, trust_remote_code=spec.trust_remote_code)
        check_quantizable(config, settings)
        facts = _quantize(spec, source, config, settings, calibration, target)
        return {**facts, **check_rounded(source, target, config, settings)}


def _quantize(spec, source, config, settings, calibration, out) -> dict:
    # each method's libraries are imported when it is chosen
    if settings.method == "awq" and settings.awq_search == "autoawq":
        from actors.quantizers.autoawq import quantize_autoawq

        return quantize_autoawq(spec, source, config, settings, calibration, out)
    if settings.method == "awq":
        from actors.quantizers.awq import quantize_awq

        return quantize_awq(spec, source, config, settings, calibration, out)
    if settings.method == "rtn":
        from actors.quantizers.rtn import quantize_rtn

        quantize_rtn(source, config, settings, out)
    elif settings.method == "hqq":
        from actors.quantizers.hqq import quantize_hqq

        quantize_hqq(source, config, settings, out)
    else:
        from actors.quantizers.bnb import quantize_bnb

        quantize_bnb(spec, source, settings, out)
    return {}
