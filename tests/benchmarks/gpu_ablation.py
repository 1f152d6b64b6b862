"""The engine on a real shape: LLaVA-1.5-7B with random weights in float16, made on the GPU; no hub, no Ray.

    make bench-gpu        (python -m tests.benchmarks.gpu_ablation --help)

29 single removals (all layers but 0, 1 and the last), prompts of 576 random image features and 24 to 31 random tokens
(--per-image 3: three of them about each image), an exact number of new tokens. (a) plain `generate` one question at a
time on the model without the layer, a part of it timed; (b) the same with all questions in padded batches, a part of
the removals timed; (c) the engine without drafts; (d) the engine, whose drafts random weights refuse almost at once:
its worst case; (forced) the engine on the same model with lm_head set to zero, so that every model says the same and
every draft is accepted whole: its best case. The vision tower is part of the model and is not run. Mismatches of (d)
and (a) are tried with the float16 weights in float32, where memory allows (see tests/ties.py). The floor is the
engine's matrix products at the measured rate plus the weights, keys and values read while decoding at the measured
bandwidth. The last line is one JSON object.
"""

import argparse
import json
from collections import Counter

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForImageTextToText

from actors.checkpoint.loading import language_model, quiet
from actors.engine.pace import Pace, WholeDrafts
from actors.engine.replica import LlavaReplica
from actors.memory import GIB, cached_bytes, free_bytes
from actors.profiler import device_facts
from actors.specs import Sample
from tests.benchmarks.machine import floor_s, timed
from tests.ties import Mismatch, first_difference, judged
from tests.tiny import llava_7b, tiny_model, without

FULL = (128, 29)  # samples and removals that the seconds are extrapolated to
SINGLE = (2, 3)  # samples and removals of (a) that are timed
BATCHED = 6  # removals of (b) that are timed
_Answers = dict[tuple[str, tuple[int, ...]], list[int]]


def real_model(config):
    """Return a model, such as LLaVA-1.5-7B, with random float16 weights on the GPU."""
    with torch.device("cuda"):
        return AutoModelForImageTextToText.from_config(config, dtype=torch.float16, attn_implementation="sdpa")


class Embedded(LlavaReplica):
    """A replica of a model in memory and of prompts that are embedded already; no answer ends early."""

    def __init__(self, model, prompts: dict[str, torch.Tensor], max_rows: int):
        self.model, self.prompts = model, prompts
        self.device = language_model(model).embed_tokens.weight.device
        self.counts, self._pace = Counter(), Pace()
        self._max_rows, self._sharers, self._stops = max_rows, 1, []

    def _prompt(self, sample: Sample) -> torch.Tensor:
        return self.prompts[sample.id]

    def _reply(self, ids: list[int]) -> dict:
        return {"token_ids": list(ids)}


@torch.inference_mode()
def random_prompts(model, count: int, image_tokens: int, per_image: int) -> dict[str, torch.Tensor]:
    """Return prompts [tokens, D] of random image features, as large as embeddings, and 24 to 31 random tokens.

    `per_image` of them have the same image, and the same tokens before it.
    """
    table = language_model(model).embed_tokens.weight
    prompts = {}
    for number in range(count):
        torch.manual_seed(number // per_image)
        before = torch.randint(3, len(table), (4,)).to(table.device)
        image = (torch.randn(image_tokens, table.shape[1]) * table.float().std().item()).to(table)
        torch.manual_seed(number)
        question = torch.randint(3, len(table), (20 + number % 8,)).to(table.device)
        prompts[f"{number:03d}"] = torch.cat([table[before], image, table[question]])
    return prompts


class Contest:
    """One model, its removals, and the ways to answer the same prompts."""

    def __init__(self, model, samples: int, image_tokens: int, tokens: int, max_rows: int, per_image: int = 1):
        self.model, self.tokens = model.eval(), tokens
        model.generation_config.update(eos_token_id=None, pad_token_id=0)
        self.replica = Embedded(model, random_prompts(model, samples, image_tokens, per_image), max_rows)
        self.samples = [Sample(name, str(i // per_image), "") for i, name in enumerate(self.replica.prompts)]
        self.sets = [(layer,) for layer in range(2, self.replica.layer_count() - 1)]

    @torch.inference_mode()
    def plain(self, names: list[str]) -> list[list[int]]:
        """Answers of plain `generate` in one padded batch."""
        prompts = [self.replica.prompts[name] for name in names]
        embeds = pad_sequence(prompts, batch_first=True, padding_side="left")
        valid = pad_sequence([torch.ones(len(p)) for p in prompts], batch_first=True, padding_side="left").to(
            embeds.device
        )
        lengths = {"min_new_tokens": self.tokens, "max_new_tokens": self.tokens}
        given = {"inputs_embeds": embeds, "attention_mask": valid.long()}
        return self.model.generate(**given, **lengths, do_sample=False).tolist()

    def single(self, sets) -> _Answers:
        """(a) One removal and one question at a time."""
        found = {}
        for removed in sets:
            with without(self.model, removed):
                for sample in self.samples[: SINGLE[0]]:
                    (found[sample.id, removed],) = self.plain([sample.id])
        return found

    def batched(self, sets) -> _Answers:
        """(b) One removal at a time, as many questions in a batch as the memory holds rows."""
        self.replica.plan(max(map(len, self.replica.prompts.values())) + self.tokens)
        found, step = {}, self.replica._rows
        for removed in sets:
            with without(self.model, removed):
                for start in range(0, len(self.samples), step):
                    names = [sample.id for sample in self.samples[start : start + step]]
                    found.update({(n, removed): ids for n, ids in zip(names, self.plain(names), strict=True)})
        return found

    def engine(self, drafts) -> _Answers:
        """(c) and (d) The engine, with drafts or with its own."""
        self.replica.counts.clear()
        sets = [(), *self.sets] if drafts is None else self.sets  # without a removal the drafts are the answers
        rows = self.replica.answers(self.samples, sets, self.tokens, (), drafts)
        return {(row["sample_id"], tuple(row["removed"])): row["token_ids"] for row in rows}

    def forced(self) -> _Answers:
        """The engine while every draft is accepted, because lm_head is zero."""
        weight = self.model.lm_head.weight
        kept = weight.detach().clone()
        weight.data.zero_()
        self.replica._pace = WholeDrafts()
        found = self.engine(None)
        weight.data.copy_(kept)
        return found

    def floor_s(self, answers: _Answers) -> float:
        """Seconds that the engine's own work takes at this machine's measured rates (after a run of `engine`)."""
        lengths = [len(prompt) + self.tokens for prompt in self.replica.prompts.values()]
        layers, text = self.replica.layer_count(), self.model.config.text_config
        drafts = {name: ids for (name, removed), ids in answers.items() if not removed}
        left = [self.tokens] * len(drafts)  # tokens that rows decode: all of a base's, a variant's after the draft
        for (name, removed), ids in answers.items():
            if removed and ids != drafts[name]:
                left.append(self.tokens - 1 - first_difference(ids, drafts[name]))
        size = self.model.lm_head.weight.element_size()
        cached = cached_bytes(text, layers, size) * sum(left) * sum(lengths) / len(lengths)
        readings = (self.tokens + max(left[len(drafts) :], default=0)) * layers
        layer = language_model(self.model).layers[0]
        return floor_s(layer, self.replica.counts["layer_tokens_run"], readings, cached)

    @torch.inference_mode()
    def ties(self, mine: _Answers, plain: _Answers) -> list[Mismatch] | None:
        """Judge every mismatch; turns the model into float32. None where that does not fit."""
        different = [key for key in plain if mine[key] != plain[key]]
        places = [first_difference(mine[key], plain[key]) for key in different]
        rounded = [self._logits(key, plain[key][:place]) for key, place in zip(different, places, strict=True)]
        if free_bytes(self.replica.device) < 1.2 * sum(p.numel() for p in self.model.parameters()) * 2:
            return None
        self.model.float()
        found = []
        for key, place, logits in zip(different, places, rounded, strict=True):
            true = self._logits(key, plain[key][:place])
            found.append(judged(place, mine[key][place], plain[key][place], logits, true))
        return found

    def _logits(self, key, prefix: list[int]) -> torch.Tensor:
        name, removed = key
        ids = torch.tensor(prefix, dtype=torch.long, device=self.replica.device)
        prompt = self.replica.prompts[name].to(self.model.dtype)
        embeds = torch.cat([prompt, language_model(self.model).embed_tokens(ids)])[None]
        with without(self.model, removed):
            return self.model(inputs_embeds=embeds, logits_to_keep=1).logits[0, -1]


def run(contest: Contest) -> dict:
    """Time the ways, print them, and return the comparison."""
    samples, removals = len(contest.samples), len(contest.sets)
    some = contest.sets[:: max(1, removals // SINGLE[1])][: SINGLE[1]]
    part = contest.sets[:: max(1, removals // BATCHED)][:BATCHED]
    empty = [[] for _ in contest.samples]
    ways = {
        "single": (lambda: contest.single(some), removals / len(some) * samples / len(contest.samples[: SINGLE[0]])),
        "batched": (lambda: contest.batched(part), removals / len(part)),
        "c": (lambda: contest.engine(empty), 1),
        "d": (lambda: contest.engine(None), 1),
        "forced": (contest.forced, 1),
    }
    contest.plain([contest.samples[0].id])  # warm-up
    contest.replica.answers(contest.samples[:1], contest.sets[:2], 2)
    found, seconds, peaks, floors, whole = {}, {}, {}, {}, {}
    for way, (answer, scale) in ways.items():
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        took, found[way] = timed(answer)
        seconds[way] = took * scale
        peaks[way] = round(torch.cuda.max_memory_allocated() / GIB, 2) if torch.cuda.is_available() else None
        if way in ("d", "forced"):
            counts = contest.replica.counts
            whole[way] = round(counts["rows_verified_whole"] / counts["rows"], 4)
            floors[way] = contest.floor_s(found[way])
        print(f"{way}: {took:.1f} s for {1 / scale:.4f} of the work, peak {peaks[way]} GiB", flush=True)
    mine = found["d"]
    same = {way: sum(mine[k] == ids for k, ids in found[way].items()) / len(found[way]) for way in ways}
    tried = contest.ties(mine, found["single"])
    full = FULL[0] * FULL[1] / samples / removals
    return {
        **device_facts(),
        "samples": samples,
        "images": len({sample.image for sample in contest.samples}),
        "removals": removals,
        "tokens": contest.tokens,
        "single_answers_timed": len(found["single"]),
        "batched_removals_timed": len(part),
        "speedup_vs_single": round(seconds["single"] / seconds["d"], 2),
        "speedup_vs_batched": round(seconds["batched"] / seconds["d"], 2),
        "forced_speedup_vs_single": round(seconds["single"] / seconds["forced"], 2),
        "forced_speedup_vs_batched": round(seconds["batched"] / seconds["forced"], 2),
        "identical_fraction": round(same["single"], 4),
        "identical_to_batched": round(same["batched"], 4),
        "identical_to_no_drafts": round(same["c"], 4),
        "mismatches": sum(mine[key] != ids for key, ids in found["single"].items()),
        "mismatches_that_are_ties": None if tried is None else sum(each.is_tie for each in tried),
        "largest_ratio": None if tried is None else round(max((each.ratio for each in tried), default=0.0), 3),
        "rows_verified_whole": whole["d"],
        "forced_rows_verified_whole": whole["forced"],
        "peak_gib": peaks["d"],
        "batched_peak_gib": peaks["batched"],
        "limit_ratio": round(seconds["d"] / floors["d"], 2),
        "forced_limit_ratio": round(seconds["forced"] / floors["forced"], 2),
        "seconds": {way: round(value, 2) for way, value in seconds.items()},
        "seconds_of_128_samples_29_layers": {way: round(value * full, 1) for way, value in seconds.items()},
    }


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=32, help="questions (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of an answer (default: %(default)s)")
    parser.add_argument("--per-image", type=int, default=1, help="questions about an image (default: %(default)s)")
    parser.add_argument("--max-rows", type=int, default=1024, help="rows of a batch (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model in float32 on the CPU: tries the code")
    options = parser.parse_args()
    quiet()
    if not options.tiny and not torch.cuda.is_available():
        parser.error("no GPU is visible here (--tiny runs anywhere)")
    torch.manual_seed(0)
    model, image_tokens = (tiny_model("clip-llama", 7), 16) if options.tiny else (real_model(llava_7b()), 576)
    sizes = options.samples, image_tokens, options.tokens, options.max_rows, options.per_image
    contest = Contest(model, *sizes)
    print(json.dumps(run(contest)))


if __name__ == "__main__":
    main()
