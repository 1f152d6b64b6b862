"""Records the ranges of the inputs of the decoder's linears (paper, figure 4)."""

from collections.abc import Sequence

import torch
from torch import nn

from actors.checkpoint.loading import language_model, pixel_dtype
from actors.conversations import collate
from actors.engine.replica import LlavaReplica
from actors.maths.ranges import range_facts
from actors.specs import Conversation, ModelSpec


class RangeRecorder:
    """One replica that records the largest |x| of every input channel of the decoder's linears."""

    def __init__(self, spec: ModelSpec, max_rows: int):
        self.replica = LlavaReplica(spec, max_rows)

    @torch.inference_mode()
    def ranges(self, samples: Sequence[Conversation]) -> list[dict]:
        """Return a row per decoder layer and input of its linears: {layer, projections, <range_facts>}.

        projections: the linears that share the input, e.g. "q_proj, k_proj, v_proj". The maxima are over all tokens of
        questions, images and reference answers.
        """
        largest: dict[tuple[int, str], torch.Tensor] = {}
        sharing: dict[tuple[int, str], list[str]] = {}
        seen: dict[int, tuple[torch.Tensor, str]] = {}  # layer -> the last input, and the first linear that had it

        def note(layer: int, name: str):
            def hook(module: nn.Module, args: tuple) -> None:
                x = args[0]
                first = seen[layer][1] if layer in seen and seen[layer][0] is x else name
                seen[layer] = (x, first)
                linears = sharing.setdefault((layer, first), [])
                if name not in linears:
                    linears.append(name)
                if first == name:
                    maxima = x.abs().flatten(0, -2).amax(0).float().cpu()
                    previous = largest.get((layer, name))
                    largest[layer, name] = maxima if previous is None else torch.maximum(previous, maxima)

            return hook

        model = self.replica.model
        handles = [
            module.register_forward_pre_hook(note(number, name.rpartition(".")[2]))
            for number, layer in enumerate(language_model(model).layers)
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear)
        ]
        try:
            for sample in samples:
                batch = collate(self.replica.processor, [sample])
                inputs = {name: value.to(self.replica.device) for name, value in batch.items() if name != "labels"}
                if "pixel_values" in inputs:
                    inputs["pixel_values"] = inputs["pixel_values"].to(pixel_dtype(model))
                model.model(**inputs, use_cache=False)
                seen.clear()
        finally:
            for handle in handles:
                handle.remove()
        return [
            {"layer": layer, "projections": ", ".join(sharing[layer, name]), **range_facts(values.numpy())}
            for (layer, name), values in largest.items()
        ]
