"""LlavaReplica: one loaded model that answers questions about images with any set of layers switched off."""

import copy
from collections import OrderedDict
from collections.abc import Sequence

import torch
from transformers import AutoModelForImageTextToText

from actors.engine import greedy
from actors.images import open_image
from actors.loading import language_model, load_model, load_processor, pixel_dtype, quiet
from actors.profiler import measure
from actors.specs import ModelSpec, Sample
from actors.surgery import stored_bytes, stored_dtype

IMAGES_KEPT = 512


class LlavaReplica:
    """A LLaVA-shaped model in memory.

    max_rows: the most rows (sample x removed set) in one batch; out of memory halves it and goes on.
    """

    def __init__(self, spec: ModelSpec, max_rows: int = 256):
        quiet()
        self._spec = spec
        self.model = load_model(**vars(spec))
        self.processor = load_processor(spec.path, spec.revision, spec.trust_remote_code)
        self.device = self.model.lm_head.weight.device
        self._max_rows = max_rows
        self._features: OrderedDict[str, torch.Tensor] = OrderedDict()
        stop = self.model.generation_config.eos_token_id
        self._stops = [] if stop is None else [stop] if isinstance(stop, int) else list(stop)

    def layer_count(self) -> int:
        """Return the number of decoder layers."""
        return self.model.config.text_config.num_hidden_layers

    def answers(self, samples: Sequence[Sample], removed_sets: Sequence[Sequence[int]], max_new_tokens: int):
        """Greedy answers for every pair of a sample and a set of removed layers (zero-based).

        Returns rows {sample_id, removed, answer, tokens, stopped}: `tokens` counts the new tokens without the
        stop token, `stopped` tells whether it came. ValueError: a layer out of range, an unreadable image.
        """
        layers = self.layer_count()
        for removed in removed_sets:
            for layer in removed:
                if not 0 <= layer < layers:
                    raise ValueError(f"Layer {layer} is out of range: the model has layers 0 to {layers - 1}.")
        prompts = [self._prompt(sample) for sample in samples]
        keep_VL = torch.ones(len(removed_sets), layers, dtype=torch.bool)
        for variant, removed in enumerate(removed_sets):
            keep_VL[variant, list(removed)] = False
        pairs = [(s, v) for s in range(len(samples)) for v in range(len(removed_sets))]
        pairs.sort(key=lambda pair: len(prompts[pair[0]]))
        tokens: dict[tuple[int, int], list[int]] = {}
        start = 0
        while start < len(pairs):
            part = pairs[start : start + self._max_rows]
            try:
                keep = keep_VL[[v for _, v in part]]
                new = greedy(self.model, [prompts[s] for s, _ in part], keep, max_new_tokens, self._stops)
            except torch.OutOfMemoryError:
                if self._max_rows == 1:
                    raise
                self._max_rows = max(1, self._max_rows // 2)
                torch.cuda.empty_cache()
                continue
            tokens.update(zip(part, new, strict=True))
            start += len(part)
        return [
            {"sample_id": sample.id, "removed": list(removed), **self._reply(tokens[s, v])}
            for s, sample in enumerate(samples)
            for v, removed in enumerate(removed_sets)
        ]

    def _reply(self, ids: list[int]) -> dict:
        stopped = bool(ids) and ids[-1] in self._stops
        text = self.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
        return {"answer": text, "tokens": len(ids) - stopped, "stopped": stopped}

    def inputs(self, sample: Sample) -> dict[str, torch.Tensor]:
        """Return the processor's tensors for one question, as a user of plain transformers would make them."""
        content = [{"type": "image"}, {"type": "text", "text": sample.question}]
        text = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        made = self.processor(images=open_image(sample.image), text=text, return_tensors="pt")
        return {k: v.to(self.device) for k, v in made.items() if k in ("input_ids", "attention_mask", "pixel_values")}

    @torch.inference_mode()
    def _prompt(self, sample: Sample) -> torch.Tensor:
        """Embed one prompt [tokens, D], with the image's features (encoded once per image) in their places."""
        inputs = self.inputs(sample)
        ids = inputs["input_ids"][0]
        if sample.image not in self._features:
            pixels = inputs["pixel_values"].to(pixel_dtype(self.model))
            out = self.model.get_image_features(pixel_values=pixels)
            self._features[sample.image] = getattr(out, "pooler_output", out)[0]
            while len(self._features) > IMAGES_KEPT:
                self._features.popitem(last=False)
        features = self._features[sample.image]
        embeds = language_model(self.model).embed_tokens(ids)
        places = ids == self.model.config.image_token_id
        if int(places.sum()) != len(features):
            raise ValueError(
                f"The prompt has {int(places.sum())} image tokens but the tower gives {len(features)}: "
                "the processor and the model do not belong together (patch_size, image size)."
            )
        embeds[places] = features.to(embeds.dtype)
        return embeds

    def parameters(self) -> int:
        """Return the number of parameters of the model as its config describes it, before any quantization."""
        return count_parameters(self.model.config)

    def profile(self, sample: Sample, warmup_runs: int, timed_runs: int, new_tokens: int) -> dict:
        """Measure memory and latency of plain `generate` on one real question (see `actors.profiler.measure`)."""
        inputs = self.inputs(sample)
        inputs["pixel_values"] = inputs["pixel_values"].to(pixel_dtype(self.model))
        facts = {
            "params": self.parameters(),
            "layers": self.layer_count(),
            "stored_bits": 8 * stored_dtype(self._spec.path, self._spec.revision).itemsize,
            "weight_bytes": stored_bytes(self._spec.path, self._spec.revision),
        }
        return {**facts, **measure(self.model, inputs, warmup_runs, timed_runs, new_tokens)}


def count_parameters(config) -> int:
    """Return the parameters of the unquantized model that a config describes, built on the meta device."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())
