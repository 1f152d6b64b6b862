"""AWQ (Lin et al. 2024; paper eq. 6-8) with the search of the autoawq package.

autoawq is archived and supports neither today's module names nor image inputs; only this file adapts it. The search
for scales and clipping is autoawq's, on the inputs that image-and-text conversations give the decoder; the rounding
and the file layout are those of actors.quantizers.rtn.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from actors.checkpoint.loading import language_model, load_model, load_processor
from actors.checkpoint.tensors import iterate_tensors
from actors.memory import TooLittleMemory
from actors.quantizers.calibration import calibration_inputs, decoder_inputs
from actors.quantizers.rtn import write_gemm
from actors.quantizers.structure import scaling_groups
from actors.specs import Conversation, ModelSpec, QuantizeSettings

MISSING = (
    "autoawq's search needs the autoawq package, which is not installed: pip install --no-deps autoawq==0.2.9 "
    "(or use the built-in search: --quantize.awq_search layerwise)."
)
LAYERWISE = "Or let AWQ hold one layer at a time: --quantize.awq_search layerwise."


def quantize_autoawq(
    source: Path,
    config,
    settings: QuantizeSettings,
    out: Path,
    spec: ModelSpec,
    calibration: Sequence[Conversation],
) -> dict:
    """Scale, clip and round the checkpoint `source`; returns {calibration_tokens}.

    ValueError: autoawq is missing, no calibration conversations, layers with different attention masks, or less memory
    than the whole model takes.
    """
    try:
        from awq.quantize.quantizer import AwqQuantizer
    except ImportError as error:
        raise ValueError(f"{MISSING} ({error})") from None
    if not calibration:
        raise ValueError("AWQ needs calibration conversations from the training split, and there are none.")
    try:
        model = load_model(**spec.loading)
    except TooLittleMemory as error:
        raise TooLittleMemory(f"{error} {LAYERWISE}") from None
    processor = load_processor(spec.path, spec.revision, spec.trust_remote_code)
    hidden, kwargs = decoder_inputs(
        model, calibration_inputs(model, processor, calibration), len(language_model(model).layers)
    )
    if any(not _same_mask(each["attention_mask"], kwargs[0]["attention_mask"]) for each in kwargs):
        raise ValueError(
            "autoawq's search supports one attention mask, but this model's layers have several (sliding windows): "
            "set quantize.awq_search to layerwise."
        )

    class Search(AwqQuantizer):
        """autoawq's search on inputs recorded from our own batches."""

        def init_quant(self, n_samples=128, max_seq_len=512):
            return language_model(model).layers, kwargs[0], hidden

    search = Search(
        awq_model=_Structure,
        model=model,
        tokenizer=None,
        w_bit=settings.bits,
        group_size=settings.group_size,
        zero_point=True,
        version="gemm",
        calib_data=None,
        split=None,
        text_column=None,
        duo_scaling=False,  # s = s_X^alpha, the paper's eq. 8
        export_compatible=True,  # leave the scaled and clipped weights unrounded: rtn rounds and packs them
        apply_clip=settings.clip,
    )
    search.quantize()
    with tempfile.TemporaryDirectory(dir=out) as scaled:
        model.save_pretrained(scaled)
        write_gemm(source, config, settings, out, iterate_tensors(Path(scaled)))
    return {"calibration_tokens": hidden.shape[0] * hidden.shape[1]}


def _same_mask(mask: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return mask is other or (mask is not None and other is not None and torch.equal(mask, other))


class _Structure:
    """What autoawq asks about a model: which linears share a scale, and what precedes them."""

    model_type = "llava"

    @staticmethod
    def move_embed(model, device) -> None:
        """The rotary embeddings are among the recorded inputs: nothing to move."""

    @staticmethod
    def get_layers_for_scaling(layer, features: dict, kwargs: dict) -> list[dict]:
        """List one decoder layer's scaling groups in autoawq's terms, with one inspected module each."""
        return [
            {
                "prev_op": layer.get_submodule(group.before),
                "layers": [layer.get_submodule(name) for name in group.linears],
                "inp": features[group.linears[0]],
                "module2inspect": layer.get_submodule(inspected),
                "kwargs": kwargs if inspected == "self_attn" else {},
            }
            for group in scaling_groups(layer)
            for (inspected,) in [group.inspected]
        ]
