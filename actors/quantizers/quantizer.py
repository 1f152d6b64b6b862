"""One interface for all quantization methods."""

from collections.abc import Sequence
from pathlib import Path

from actors.checkpoint.loading import quiet
from actors.quantizers.awq import search_to_files, write_searched
from actors.quantizers.storage import check_rounded, keep_blocks_apart
from actors.quantizers.structure import open_checkpoint
from actors.quantizers.table import find_method, load_function
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

        Only calibrated methods use `calibration` (of the training split). The facts are those of
        actors.quantizers.storage.check_rounded, and AWQ's calibration_tokens. ValueError: the method cannot round this
        model.
        """
        source, config = open_checkpoint(spec, settings)
        method = find_method(settings.method)
        inputs = {"spec": spec, "calibration": calibration} if method.calibrated else {}
        facts = load_function(method.function)(source, config, settings, Path(out), **inputs) or {}
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
        """Search share `part` (0 to `parts` - 1) of the layers; see actors.quantizers.awq.search_to_files."""
        source, config = open_checkpoint(spec, settings)
        layers = config.text_config.num_hidden_layers
        share = range(layers * part // parts, layers * (part + 1) // parts)
        return search_to_files(spec, source, config, settings, calibration, share, Path(folder))

    def finish(self, spec: ModelSpec, settings: QuantizeSettings, folder: str, out: str) -> dict:
        """Write the checkpoint from the layers that `search` wrote to `folder`; return facts about it."""
        source, config = open_checkpoint(spec, settings)
        write_searched(source, config, settings, Path(folder), Path(out))
        return check_rounded(Path(out), config, settings)
