"""LlavaReplica: one loaded model that answers questions about images with any set of layers switched off."""

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

import torch
from transformers import GenerationConfig

from actors import footprint
from actors.checkpoint.loading import (
    check_source,
    language_model,
    layer_devices,
    load_model,
    load_processor,
    pick_device,
    pixel_dtype,
    quiet,
)
from actors.checkpoint.tensors import stored_bytes, stored_dtype
from actors.decoding import DECODERS, check_greedy
from actors.engine.answering import drafts_pay, verify_drafts
from actors.engine.linears import repacked_linears
from actors.engine.pace import Pace
from actors.engine.steps import Limits
from actors.engine.threads import threads_for
from actors.images import open_image
from actors.memory import cached_bytes, count_parameters, free_bytes, out_of_memory
from actors.profiler import device_facts, measure
from actors.quantizers.structure import weight_bits
from actors.specs import ModelSpec, Sample

IMAGES_KEPT = 512
TRIAL = 8  # at first, an eighth of the questions tells whether drafts pay
_Groups = list[list[int]]  # samples
_Found = list[tuple[tuple[int, int], list[int]]]  # ((sample, variant), token ids)


class LlavaReplica:
    """A LLaVA-shaped model in memory.

    max_rows: the most rows (sample x removed set) in one batch. Fewer are planned where the free memory does
    not hold their keys and values; out of memory halves the batch and goes on. ValueError: what `load_model` refuses,
    or a generation config that asks for more than the best token (repetition_penalty and its likes).
    """

    def __init__(self, spec: ModelSpec, max_rows: int = 1024):
        quiet()
        _check_settings(spec)
        self._spec = spec
        device = pick_device() if spec.gpus else "cpu"
        self._memory = {"baseline_bytes": footprint.taken(device)}
        self.model = load_model(**spec.loading)
        check_greedy(self.model.generation_config, spec.path)
        self.processor = load_processor(spec.path, spec.revision, spec.trust_remote_code)
        self._memory["load_peak_bytes"] = footprint.peak(device)
        self.device = language_model(self.model).embed_tokens.weight.device
        self._max_rows, self._sharers = max_rows, spec.sharers
        self.counts: Counter[str] = Counter()
        self._pace = Pace()
        self._features: OrderedDict[str, torch.Tensor] = OrderedDict()
        stop = self.model.generation_config.eos_token_id
        self._stops = [] if stop is None else [stop] if isinstance(stop, int) else list(stop)

    def layer_count(self) -> int:
        """Return the number of decoder layers."""
        return self.model.config.text_config.num_hidden_layers

    def answers(
        self,
        samples: Sequence[Sample],
        removed_sets: Sequence[Sequence[int]],
        max_new_tokens: int,
        base: Sequence[int] = (),
        drafts: Sequence[Sequence[int]] | None = None,
        guesses: Sequence[Sequence[int]] | None = None,
    ) -> list[dict]:
        """Greedy answers for every pair of a sample and a set of removed layers (zero-based).

        base: the removed set whose answers serve as drafts, and whose work the others share below the lowest
        layer in which they differ. drafts: its token ids per sample, where they are known; guesses: what they may
        be, where they are not (a fine-tuned model often says the reference). Wrong ones cost time only. Returns
        rows {sample_id, removed, answer, token_ids, tokens, stopped}: `tokens` counts the new tokens without the
        stop token, `stopped` tells whether it came. ValueError: a layer out of range, an unreadable image.
        """
        with repacked_linears(self.model, self._sharers):
            return self._answers(samples, removed_sets, max_new_tokens, base, drafts, guesses)

    def _answers(self, samples, removed_sets, max_new_tokens, base, drafts, guesses) -> list[dict]:
        base_L, keep_VL = self.keep([base])[0], self.keep(removed_sets)
        if not samples or not removed_sets:
            return []
        is_base = (keep_VL == base_L).all(1)
        choose = drafts is None and bool(is_base.any() and not is_base.all())
        if choose and len(samples) > 1 and not self._pace.knows_drafts():
            trial = max(1, len(samples) // TRIAL)
            first, rest = ((samples[part], guesses and guesses[part]) for part in (slice(trial), slice(trial, None)))
            rows = self._answers(first[0], removed_sets, max_new_tokens, base, None, first[1])
            return rows + self._answers(rest[0], removed_sets, max_new_tokens, base, None, rest[1])
        limits = Limits(max_new_tokens, tuple(self._stops))
        prompts = [self._prompt(sample) for sample in samples]
        self.plan(max(map(len, prompts)) + max_new_tokens)
        if choose and not drafts_pay(self._pace, prompts, bool(guesses), base_L, keep_VL, max_new_tokens):
            drafts = [[] for _ in prompts]
        token_ids: dict[tuple[int, int], list[int]] = {}
        open_variants = list(range(len(keep_VL)))
        if drafts is None:
            groups = group_by_image(samples, list(map(len, prompts)))
            drafts_N = dict(self.batched(groups, [], partial(self._base_answers, prompts, guesses, base_L, limits)))
            drafts = [drafts_N[i, -1] for i in range(len(prompts))]
            for v in is_base.nonzero()[:, 0].tolist():
                token_ids.update({(i, v): list(draft) for i, draft in enumerate(drafts)})
                open_variants.remove(v)
        groups = group_by_image(samples, [len(p) + len(d) for p, d in zip(prompts, drafts, strict=True)])
        check = partial(self._checked_answers, prompts, drafts, base_L, keep_VL, limits)
        if open_variants:
            token_ids.update(self.batched(groups, open_variants, check))
        return [
            {"sample_id": sample.id, "removed": list(removed), **self._reply(token_ids[s, v])}
            for s, sample in enumerate(samples)
            for v, removed in enumerate(removed_sets)
        ]

    def keep(self, removed_sets: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return keep_VL [V, L]: True where variant v keeps layer l; ValueError: a layer out of range."""
        layers = self.layer_count()
        keep_VL = torch.ones(len(removed_sets), layers, dtype=torch.bool)
        for variant, removed in enumerate(removed_sets):
            for layer in removed:
                if not 0 <= layer < layers:
                    raise ValueError(f"Layer {layer} is out of range: the model has layers 0 to {layers - 1}.")
            keep_VL[variant, list(removed)] = False
        return keep_VL

    def plan(self, tokens: int) -> None:
        """Plan how many rows of `tokens` tokens every device's free memory holds: keys, values, activations, mask.

        Of a machine's memory this replica plans with its share; a GPU's is capped already (`claim_devices`).
        """
        text = self.model.config.text_config
        size = self.model.lm_head.weight.element_size()
        self._rows = self._max_rows
        for device, layers in Counter(layer_devices(self.model)).items():
            per_row = tokens * (cached_bytes(text, layers, size) + 8 * size * text.hidden_size + tokens)
            self._rows = max(1, min(self._rows, int(0.6 * free_bytes(device) / self._sharers / per_row)))

    def _base_answers(self, prompts, guesses, base_L, limits, part: list[int], _: list[int]) -> _Found:
        given = [prompts[i] for i in part], [guesses[i] if guesses else [] for i in part]
        answers, counts = verify_drafts(self.model, *given, base_L, base_L[None], limits, self._pace)
        self.counts["layer_tokens_run"] += counts["layer_tokens_run"]
        return [((i, -1), answer) for i, [answer] in zip(part, answers, strict=True)]

    def _checked_answers(self, prompts, drafts, base_L, keep_VL, limits, part: list[int], chosen: list[int]) -> _Found:
        given = [prompts[i] for i in part], [drafts[i] for i in part]
        answers, counts = verify_drafts(self.model, *given, base_L, keep_VL[chosen], limits, self._pace)
        self.counts.update(counts)
        return [((i, v), answers[n][c]) for n, i in enumerate(part) for c, v in enumerate(chosen)]

    def batched(self, groups: _Groups, chosen: list[int], run: Callable[[list[int], list[int]], _Found]) -> _Found:
        """Run samples x (base and chosen variants) in batches of at most the planned rows, halved on out of memory.

        groups: samples that share an image, which are parted last: by what they share they cost less than variants do.
        """
        samples = [i for group in groups for i in group]
        rows, single = len(samples) * (len(chosen) + 1), len(samples) <= 1 and len(chosen) <= 1
        if rows > self._rows and not single:
            return self._halves(groups, chosen, run)
        try:
            return run(samples, chosen)
        except RuntimeError as error:
            if not out_of_memory(error) or single:
                raise
        torch.cuda.empty_cache()
        self._rows = self._max_rows = max(1, rows // 2)
        return self._halves(groups, chosen, run)

    def _halves(self, groups: _Groups, chosen: list[int], run: Callable[[list[int], list[int]], _Found]) -> _Found:
        if len(groups) == 1 and len(chosen) > 1:
            half = len(chosen) // 2
            return self.batched(groups, chosen[:half], run) + self.batched(groups, chosen[half:], run)
        if len(groups) == 1:
            groups = [[i] for i in groups[0]]
        half = len(groups) // 2
        return self.batched(groups[:half], chosen, run) + self.batched(groups[half:], chosen, run)

    def _reply(self, ids: list[int]) -> dict:
        stopped = bool(ids) and ids[-1] in self._stops
        text = self.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
        return {"answer": text, "token_ids": list(ids), "tokens": len(ids) - stopped, "stopped": stopped}

    def inputs(self, sample: Sample) -> dict[str, torch.Tensor]:
        """Return the processor's tensors for one question, as a user of plain transformers would make them."""
        made = self.processor(images=open_image(sample.image), text=self._text(sample), return_tensors="pt")
        return {k: v.to(self.device) for k, v in made.items() if k in ("input_ids", "attention_mask", "pixel_values")}

    def _text(self, sample: Sample) -> str:
        content = [{"type": "image"}, {"type": "text", "text": sample.question}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def _prompt(self, sample: Sample) -> torch.Tensor:
        return self.embedded(sample)[0]

    @torch.inference_mode()
    def embedded(self, sample: Sample) -> tuple[torch.Tensor, torch.Tensor]:
        """Embed one prompt [T, D], the image's features (encoded once per image) in their places is_image [T]."""
        if sample.image in self._features:  # its tokens are known, too: what the processor makes of the text
            features, token = self._features[sample.image], self.processor.image_token
            text = self._text(sample).replace(token, token * len(features))
            ids = self.processor.tokenizer(text, return_tensors="pt")["input_ids"][0].to(self.device)
        else:
            inputs = self.inputs(sample)
            ids = inputs["input_ids"][0]
            pixels = inputs["pixel_values"].to(pixel_dtype(self.model))
            vision = self.model.config.vision_config
            tokens = (vision.image_size // vision.patch_size) ** 2
            with threads_for(tokens, vision.hidden_size, vision.intermediate_size):
                out = self.model.get_image_features(pixel_values=pixels)
            features = self._features[sample.image] = getattr(out, "pooler_output", out)[0]
            while len(self._features) > IMAGES_KEPT:
                self._features.popitem(last=False)
        embeds = language_model(self.model).embed_tokens(ids)
        places = ids == self.model.config.image_token_id
        if int(places.sum()) != len(features):
            raise ValueError(
                f"The prompt has {int(places.sum())} image tokens but the tower gives {len(features)}: "
                "the processor and the model do not belong together (patch_size, image size)."
            )
        embeds[places] = features.to(embeds)
        return embeds, places

    @torch.inference_mode()
    def generated(self, sample: Sample, max_new_tokens: int) -> list[int]:
        """Return the answer's token ids of plain `generate`, at batch 1 as a user of plain transformers runs it."""
        inputs = self._pixels(sample)
        out = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        return out[0, inputs["input_ids"].shape[1] :].tolist()

    def profile(self, sample: Sample, warmup_runs: int, timed_runs: int, new_tokens: int, decode: str) -> dict:
        """Measure memory and latency on one real question: a round for `actors.maths.latency.merged`.

        decode: "plain" or "static", see `actors.decoding`. Bytes: what was taken before loading (interpreter and
        libraries, or the context), the peak of loading, and the peak of the runs (with loading, if `peak_restarted`
        is false). `runs` has every measured run's times (ms).
        """
        device, path, revision = self.device.type, self._spec.path, self._spec.revision
        decoder = DECODERS[decode](self.model)
        warmup_runs = max(warmup_runs, int(decode == "static"))  # its first run captures the step
        restarted = footprint.restart_peak(device)
        runs = measure(self.model, lambda: self._pixels(sample), decoder, warmup_runs, timed_runs, new_tokens)
        steady, (place, kind) = footprint.peak(device), footprint.KINDS[device]
        stored = 8 * stored_dtype(path, revision).itemsize
        return {
            "params": count_parameters(self.model.config),
            "layers": self.layer_count(),
            "bits": weight_bits(self.model.config, stored),
            "stored_bits": stored,
            "weight_bytes": stored_bytes(path, revision),
            "decode": decode,
            "timed_tokens": new_tokens,
            **self._memory,
            "steady_peak_bytes": steady,
            "peak_restarted": restarted,
            "peak_memory_bytes": steady[kind],
            "peak_memory_kind": f"{place}, {kind}",
            **device_facts(),
            "runs": runs,
        }

    def _pixels(self, sample: Sample) -> dict[str, torch.Tensor]:
        inputs = self.inputs(sample)
        return {**inputs, "pixel_values": inputs["pixel_values"].to(pixel_dtype(self.model))}


def group_by_image(samples: Sequence[Sample], lengths: Sequence[int]) -> list[list[int]]:
    """Return the samples' places in groups of those about one image; shorter groups first, and samples in them."""
    groups: dict[str, list[int]] = {}
    for i in sorted(range(len(samples)), key=lengths.__getitem__):
        groups.setdefault(samples[i].image, []).append(i)
    return sorted(groups.values(), key=lambda group: lengths[group[-1]])


def _check_settings(spec: ModelSpec) -> None:
    """Refuse a generation config before the weights are loaded; where there is none, the model makes its own."""
    check_source(spec.path)
    with suppress(OSError):
        check_greedy(GenerationConfig.from_pretrained(spec.path, revision=spec.revision), spec.path)
