"""The model that a checkpoint was made from, run by the gate one decoder layer at a time."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import nn

from actors.checkpoint.config import read_config
from actors.checkpoint.loading import language_model, load_processor
from actors.checkpoint.pruning import check_removal, renumbering
from actors.checkpoint.tensors import local_folder
from actors.probe import placed_probe
from actors.quantizers.awq import pass_through
from actors.quantizers.calibration import decoder_inputs, without_layers
from actors.quantizers.storage import fill, read_layers, release
from actors.quantizers.structure import empty_decoder
from actors.specs import ModelSpec


class Parent:
    """Runs the probe through a checkpoint without the decoder layers `removed`.

    Memory holds the tower, the projector and the embeddings while the probe is embedded; then the final norm, the head
    and one layer at a time. mask: changes every layer (number after the removal, layer) before it is used. ValueError:
    not a LLaVA-shaped checkpoint, or weights are missing.
    """

    def __init__(
        self, spec: ModelSpec, removed: Sequence[int] = (), mask: Callable[[int, nn.Module], None] | None = None
    ):
        self._mask = mask
        self.folder = local_folder(spec.path, spec.revision)
        self.config = read_config(self.folder, trust_remote_code=spec.trust_remote_code)
        count = self.config.text_config.num_hidden_layers
        self.renumbered = renumbering(check_removal(removed, count), count)
        model = without_layers(spec, self.folder, self.config)
        processor = load_processor(str(self.folder), trust_remote_code=spec.trust_remote_code)
        self.embedded, self._kwargs = decoder_inputs(model, placed_probe(model, processor), count)
        decoder = language_model(model)
        self._norm = getattr(decoder, "norm", None) or decoder.final_layernorm
        self._head = model.lm_head
        self._hidden = self.embedded.clone()
        del model, decoder
        release()

    def layers(self) -> Iterator[tuple[int, nn.Module, torch.Tensor, dict]]:
        """Yield every kept layer once, in order: (number after the removal, layer, its input [1, T, D], arguments)."""
        decoder = empty_decoder(self.config)
        stored = read_layers(self.folder, len(decoder.layers))
        for number, layer in enumerate(decoder.layers):
            tensors = next(stored)
            if number not in self.renumbered:
                continue
            fill(layer, tensors, self._hidden)
            del tensors
            if self._mask:
                self._mask(self.renumbered[number], layer)
            yield self.renumbered[number], layer, self._hidden, self._kwargs[number]
            pass_through(layer, self._hidden, self._kwargs[number])
            layer.to("meta")
            release()

    def run(self) -> None:
        """Run all layers, for `logits`."""
        for _ in self.layers():
            pass

    @torch.inference_mode()
    def logits(self) -> np.ndarray:
        """Return the logits [V] of the token after the probe, in float32; `layers` must be exhausted first."""
        return self._head(self._norm(self._hidden[:, -1:]))[0, -1].float().cpu().numpy()
