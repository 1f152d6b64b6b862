"""The calibration inputs of AWQ's search: what image-and-text conversations give the decoder layers."""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForImageTextToText

from actors.checkpoint.loading import language_model, load_processor, loading_weights, pick_device, pixel_dtype
from actors.checkpoint.pruning import pruned_config
from actors.checkpoint.tensors import loadable
from actors.conversations import collate
from actors.specs import Conversation, Llava, ModelSpec

TOKENS = 2048  # calibration tokens that are run at once
ARGUMENTS = ("attention_mask", "position_ids", "position_embeddings")


def calibration_inputs(model: Llava, processor, conversations: Sequence[Conversation]) -> dict[str, torch.Tensor]:
    """Return a batch without padding: the longer half of the conversations, cut to the shortest one's length."""
    lengths = [int(collate(processor, [c])["attention_mask"].sum()) for c in conversations]
    order = sorted(range(len(conversations)), key=lambda i: -lengths[i])[: (len(conversations) + 1) // 2]
    batch = collate(processor, [conversations[i] for i in order])
    shortest = min(lengths[i] for i in order)
    device = model.lm_head.weight.device
    rows = {"input_ids": batch["input_ids"][:, :shortest].to(device)}
    if "pixel_values" in batch:
        rows["pixel_values"] = batch["pixel_values"].to(device, pixel_dtype(model))
    return rows


class _Recorder(nn.Module):
    """Stands in for a decoder layer: records its arguments and returns the hidden states unchanged."""

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        self.hidden, self.kwargs = hidden_states, {name: kwargs.get(name) for name in ARGUMENTS}
        return hidden_states


@torch.no_grad()
def decoder_inputs(model: Llava, rows: dict[str, torch.Tensor], layers: int) -> tuple[torch.Tensor, list[dict]]:
    """Return the first decoder layer's hidden states [B, T, D] and, for each of `layers`, its keyword arguments.

    Since no row is padded, the arguments of one row hold for all. The decoder's own layers do not run: the model may
    lack most of them (`without_layers`).
    """
    decoder = language_model(model)
    original = decoder.layers
    decoder.layers = nn.ModuleList(_Recorder() for _ in range(layers))
    try:
        first = decoder.layers[0]
        model.model(**{name: value[:1] for name, value in rows.items()}, use_cache=False)
        kwargs = [recorder.kwargs for recorder in decoder.layers]
        count = rows["input_ids"].shape[0]
        hidden = torch.empty(count, *first.hidden.shape[1:], dtype=first.hidden.dtype, device=first.hidden.device)
        for places in torch.arange(count).split(rows_at_once(rows["input_ids"].shape[1])):
            model.model(**{name: value[places] for name, value in rows.items()}, use_cache=False)
            hidden[places] = first.hidden
    finally:
        decoder.layers = original
    return hidden, kwargs


def rows_at_once(length: int) -> int:
    """Return how many rows of `length` tokens are run at once."""
    return max(1, TOKENS // length)


def inputs_of_checkpoint(
    spec: ModelSpec, source: Path, config, conversations: Sequence[Conversation]
) -> tuple[torch.Tensor, list[dict]]:
    """Return `decoder_inputs` of a checkpoint, of whose decoder layers only one of each kind is loaded.

    ValueError: a weight of the vision tower, the projector or the embeddings is missing.
    """
    model = without_layers(spec, source, config)
    processor = load_processor(str(source), trust_remote_code=spec.trust_remote_code)
    rows = calibration_inputs(model, processor, conversations)
    return decoder_inputs(model, rows, config.text_config.num_hidden_layers)


def without_layers(spec: ModelSpec, source: Path, config) -> Llava:
    """Load a checkpoint with only one decoder layer of each kind, for `decoder_inputs`.

    ValueError: a weight of the vision tower, the projector or the embeddings is missing.
    """
    text = config.text_config
    kinds = getattr(text, "layer_types", None) or [None] * text.num_hidden_layers
    present = {kinds.index(kind) for kind in kinds}
    with loadable(source) as folder, loading_weights(str(source)):
        model, info = AutoModelForImageTextToText.from_pretrained(
            folder,
            config=pruned_config(deepcopy(config), [i for i in range(text.num_hidden_layers) if i not in present]),
            dtype=getattr(torch, spec.dtype),
            device_map={"": pick_device()},
            attn_implementation="sdpa",
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=spec.trust_remote_code,
        )
    if info["missing_keys"] or info["mismatched_keys"]:
        name = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))[0]
        raise ValueError(f"{str(source)!r} does not hold the model its config.json describes: see {name!r}.")
    decoder = language_model(model)
    decoder.config.num_hidden_layers = text.num_hidden_layers
    if kinds[0] is not None:
        decoder.config.layer_types = kinds
    return model.eval()
