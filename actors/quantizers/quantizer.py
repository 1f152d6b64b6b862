"""One interface for all quantization methods."""

from collections.abc import Sequence
from pathlib import Path

from actors.checkpoint.loading import quiet
from actors.quantizers.awq import quantize_awq, search_to_files, write_searched
from actors.quantizers.storage import check_rounded, keep_blocks_apart
from actors.quantizers.structure import open_checkpoint
from actors.specs import Conversation, ModelSpec, QuantizeSettings


class Quantizer:
    """Quantizes checkpoints, whatever the method."""

    def __init__(self):
        quiet()
        keep_blocks_apart()

    def quantize(
        self, spec: ModelSpec, settings: QuantizeSettings, calibration: Sequence[Conversation], out: str
    ) -> dict:
        """Write the checkpoint of `spec` with its decoder linears rounded to `out` and return facts about it.

        `calibration` (training split only) is read by AWQ alone. The facts are those of
        actors.quantizers.storage.check_rounded, and AWQ's calibration_tokens. ValueError: the method cannot do this.
        """
        source, config = open_checkpoint(spec, settings)
        facts = _quantize(spec, source, config, settings, calibration, Path(out))
        return {**facts, **check_rounded(Path(out), config, settings)}

    def search(
        self,
        spec: ModelSpec,
        settings: QuantizeSettings,
        calibration: Sequence[Conversation],
        part: int,
        parts: int,
        folder: str,
    ) -> dict:
        """Search the layers of part 0 <= `part` < `parts`; see actors.quantizers.awq.search_to_files."""
        source, config = open_checkpoint(spec, settings)
        layers = config.text_config.num_hidden_layers
        share = range(layers * part // parts, layers * (part + 1) // parts)
        return search_to_files(spec, source, config, settings, calibration, share, Path(folder))

    def finish(self, spec: ModelSpec, settings: QuantizeSettings, folder: str, out: str) -> dict:
        """Write the checkpoint from what `search` has written to `folder` of all layers; returns facts about it."""
        source, config = open_checkpoint(spec, settings)
        write_searched(source, config, settings, Path(folder), Path(out))
        return check_rounded(Path(out), config, settings)


def _quantize(spec, source, config, settings, calibration, out) -> dict:
    # each method's libraries are imported when it is chosen
    if settings.method == "awq" and settings.awq_search == "autoawq":
        from actors.quantizers.autoawq import quantize_autoawq

        return quantize_autoawq(spec, source, config, settings, calibration, out)
    if settings.method == "awq":
        return quantize_awq(spec, source, config, settings, calibration, out)
    if settings.method == "rtn":
        from actors.quantizers.rtn import quantize_rtn

        quantize_rtn(source, config, settings, out)
    elif settings.method == "hqq":
        from actors.quantizers.hqq import quantize_hqq

        quantize_hqq(source, config, settings, out)
    else:
        from actors.quantizers.bnb import quantize_bnb

        quantize_bnb(source, config, settings, out)
    return {}
