"""Activation-aware weight quantization (Lin et al. 2024; paper eq. 6-8) by the autoawq package.

autoawq is archived and knows neither today's module names nor image inputs, so this file, and no other, adapts
it: the search for scales and clipping is autoawq's, run on the inputs that real image-and-text conversations
give the decoder; the rounding and the file layout are those of actors.quantizers.rtn.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from actors.conversations import collate
from actors.loading import language_model, load_model, load_processor, pixel_dtype
from actors.quantizers.rtn import quantize_rtn
from actors.specs import Conversation, Llava, ModelSpec, QuantizeSettings
from actors.surgery import copy_companions, local_folder

CLIP_BLOCK = 64
MISSING = (
    "The awq quantizer needs the autoawq package, which is not installed: pip install --no-deps autoawq==0.2.9 "
    "(or choose --quantize.method nf4 or rtn)."
)


def quantize_awq(spec: ModelSpec, settings: QuantizeSettings, calibration: Sequence[Conversation], out: Path) -> dict:
    """Scale, clip and round the checkpoint `spec`; returns {linears, calibration_tokens}.

    ValueError: autoawq is missing, no calibration conversations, or a decoder layer of unknown structure.
    """
    try:
        from awq.quantize.quantizer import AwqQuantizer
    except ImportError as error:
        raise ValueError(f"{MISSING} ({error})") from None
    if not calibration:
        raise ValueError("AWQ needs calibration conversations from the training split, and there are none.")
    model = load_model(**vars(spec))
    check_sizes(model, settings)
    processor = load_processor(spec.path, spec.revision, spec.trust_remote_code)
    rows = calibration_inputs(model, processor, calibration)

    class Search(AwqQuantizer):
        """autoawq's search on inputs recorded from our own batches."""

        def init_quant(self, n_samples=128, max_seq_len=512):
            inputs, kwargs = first_layer_inputs(model, rows)
            return language_model(model).layers, kwargs, inputs

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
        copy_companions(local_folder(spec.path, spec.revision), Path(scaled))
        model.save_pretrained(scaled)
        facts = quantize_rtn(scaled, out, settings.group_size)
    return {**facts, "calibration_tokens": int(rows["input_ids"].numel())}


def check_sizes(model: Llava, settings: QuantizeSettings) -> None:
    """ValueError if autoawq's search would stop at a linear's size; it walks outputs in blocks of 64 to clip."""
    for name, module in language_model(model).layers.named_modules():
        if isinstance(module, torch.nn.Linear) and module.in_features % settings.group_size:
            raise ValueError(
                f"awq cannot round layer {name} of {module.in_features} inputs in groups of {settings.group_size}: "
                "choose a quantize.group_size that divides it."
            )
        if isinstance(module, torch.nn.Linear) and settings.clip and module.out_features % CLIP_BLOCK:
            raise ValueError(
                f"awq cannot clip layer {name} of {module.out_features} outputs, which {CLIP_BLOCK} does not divide: "
                "set quantize.clip to false."
            )


def calibration_inputs(model: Llava, processor, conversations: Sequence[Conversation]) -> dict[str, torch.Tensor]:
    """Return a batch without padding: the longer half of the conversations, cut to the shortest of them."""
    lengths = [int(collate(processor, [c])["attention_mask"].sum()) for c in conversations]
    order = sorted(range(len(conversations)), key=lambda i: -lengths[i])[: (len(conversations) + 1) // 2]
    batch = collate(processor, [conversations[i] for i in order])
    shortest = min(lengths[i] for i in order)
    device = model.lm_head.weight.device
    return {
        "input_ids": batch["input_ids"][:, :shortest].to(device),
        "pixel_values": batch["pixel_values"].to(device, pixel_dtype(model)),
    }


class _Stop(Exception):
    """Raised by the hook once the first layer's inputs are known."""


@torch.inference_mode()
def first_layer_inputs(model: Llava, rows: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict]:
    """Return what the first decoder layer is given for a batch: hidden states [B, T, D] and its keyword arguments."""
    caught: dict = {}

    def hook(module, args, kwargs):
        caught.update(kwargs, hidden_states=args[0] if args else kwargs["hidden_states"])
        raise _Stop

    handle = language_model(model).layers[0].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        model(**rows, use_cache=False)
    except _Stop:
        pass
    finally:
        handle.remove()
    inputs = caught.pop("hidden_states").clone()
    kept = ("attention_mask", "position_ids", "position_embeddings")
    return inputs, {name: caught.get(name) for name in kept}


class _Structure:
    """What autoawq asks about a model: which linears share a scale, and what precedes them."""

    model_type = "llava"

    @staticmethod
    def move_embed(model, device) -> None:
        """The rotary embeddings are among the recorded inputs: nothing to move."""

    @staticmethod
    def get_layers_for_scaling(layer, features: dict, kwargs: dict) -> list[dict]:
        """List one decoder layer's scaling groups: input norm -> q, k, v; v -> o; norm -> gate, up; up -> down."""
        attention, mlp = layer.self_attn, layer.mlp
        if not (hasattr(mlp, "gate_proj") and hasattr(layer, "post_attention_layernorm")):
            raise ValueError(
                f"awq does not know the structure of {type(layer).__name__} (gated MLP after its own norm expected): "
                "choose --quantize.method nf4 or rtn."
            )
        groups = [
            {
                "prev_op": layer.input_layernorm,
                "layers": [attention.q_proj, attention.k_proj, attention.v_proj],
                "inp": features["self_attn.q_proj"],
                "module2inspect": attention,
                "kwargs": kwargs,
            },
            {
                "prev_op": layer.post_attention_layernorm,
                "layers": [mlp.gate_proj, mlp.up_proj],
                "inp": features["mlp.gate_proj"],
                "module2inspect": mlp,
            },
            {"prev_op": mlp.up_proj, "layers": [mlp.down_proj], "inp": features["mlp.down_proj"]},
        ]
        if attention.v_proj.weight.shape == attention.o_proj.weight.shape:  # not with grouped-query attention
            groups.append(
                {"prev_op": attention.v_proj, "layers": [attention.o_proj], "inp": features["self_attn.o_proj"]}
            )
        return groups
