"""The engine against its rivals: the same questions and removals in one run, interleaved.

    make bench-ablation        (python -m tests.benchmarks.ablation --help)

Every way answers for the whole model and for single removals, as the first round of jobs.ablate does:
(a) the authors' way: a physically pruned model per removal, one question at a time, plain `generate`;
(b) the strongest simple loop: one removal at a time, all questions in one padded batch, plain `generate`;
(c) the engine without drafts; (d) with whole drafts, always; (e) as jobs.ablate uses it, after one unit of four other
questions, which tells it whether drafts pay. On three models: derm-smol (30 layers) as it is trained, and with an
untrained projector, when most drafts are wrong; and derm-tiny (10 layers). Loading is not timed. (a) and (b) run once,
the engine `--repeats` times, and its medians count; a rival counts at its best number of threads, the engine at each.
The floor is described in tests/benchmarks/floor.py. The last line is one JSON object.
"""

import argparse
import json
import statistics
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from actors.checkpoint.loading import load_model, load_processor, quiet
from actors.checkpoint.pruning import prune_checkpoint
from actors.conversations import reply_ids
from actors.derm_tiny import sentences, world
from actors.derm_tiny.draw import draw, sample_lesion
from actors.engine.pace import Pace, WholeDrafts
from actors.engine.replica import LlavaReplica
from actors.images import open_image
from actors.specs import Conversation, ModelSpec
from jobs.make_derm_smol import build
from tests.benchmarks.floor import floor_parts
from tests.benchmarks.machine import timed

DERM_TINY = Path(__file__).resolve().parents[2] / "actors" / "derm_tiny" / "checkpoint"
TOKENS, WARM = 64, 4
ENGINE = ("without drafts", "with drafts", "as used")


def conversations(folder: Path, count: int, questions: dict[str, str], answer) -> list[Conversation]:
    """Draw images, and return `count` questions about as few of them as they take, with references."""
    folder.mkdir(parents=True)
    made: list[Conversation] = []
    for number in range(-(-count // len(questions))):
        rng = np.random.default_rng([8, number])
        lesion, path = sample_lesion(rng), folder / f"{number}.png"
        Image.fromarray(draw(lesion, rng)).save(path)
        made += [Conversation(f"{number}-{q}", str(path), text, answer(lesion, q)) for q, text in questions.items()]
    return made[:count]


class Contest:
    """One model, its physically pruned versions, and the ways to answer the same questions."""

    def __init__(self, checkpoint: Path, samples: list[Conversation], removals: int, scratch: Path, max_rows: int):
        self.samples, self.warm = samples[WARM:], samples[:WARM]
        self.replica = LlavaReplica(ModelSpec(str(checkpoint), dtype="float32"), max_rows)
        self.processor = load_processor(str(checkpoint))
        layers = self.replica.layer_count()
        self.sets = [(), *((int(x),) for x in np.linspace(1, layers - 2, removals).round())]
        self.pruned = {(): self.replica.model}
        for removed in self.sets[1:]:
            out = scratch / f"without-{removed[0]}"
            prune_checkpoint(str(checkpoint), str(out), removed)
            self.pruned[removed] = load_model(str(out), dtype="float32")

    def single(self) -> dict:
        """(a) One removal and one question at a time."""
        answers = {}
        for removed, model in self.pruned.items():
            for sample in self.samples:
                inputs = self.replica.inputs(sample)
                out = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
                answers[sample.id, removed] = self._trim(out[0, inputs["input_ids"].shape[1] :].tolist())
        return answers

    def batched(self) -> dict:
        """(b) One removal at a time, all questions in one padded batch."""
        answers = {}
        texts = [self.replica._text(sample) for sample in self.samples]
        for removed, model in self.pruned.items():
            images = [open_image(sample.image) for sample in self.samples]
            made = self.processor(images=images, text=texts, return_tensors="pt", padding=True, padding_side="left")
            inputs = {key: made[key] for key in ("input_ids", "attention_mask", "pixel_values")}
            out = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
            for sample, row in zip(self.samples, out[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
                answers[sample.id, removed] = self._trim(row)
        return answers

    def prepare(self, way: str) -> None:
        """Bring the engine into the state in which a way is timed."""
        self.replica._pace = WholeDrafts() if way == "with drafts" else Pace()
        if way == "as used":
            self._answer(self.warm, None)
        self.replica._features.clear()  # the images count, as they do for the others
        self.replica.counts.clear()

    def answer(self, way: str) -> dict:
        """(c), (d), (e): the engine's answers."""
        return self._answer(self.samples, [[] for _ in self.samples] if way == "without drafts" else None)

    def _answer(self, samples: list[Conversation], drafts) -> dict:
        guesses = [reply_ids(self.processor.tokenizer, sample.reference) for sample in samples]
        rows = self.replica.answers(samples, self.sets, TOKENS, (), drafts, None if drafts else guesses)
        return {(row["sample_id"], tuple(row["removed"])): row["token_ids"] for row in rows}

    def _trim(self, ids: list[int]) -> list[int]:
        stop = self.processor.tokenizer.eos_token_id
        return ids[: ids.index(stop) + 1] if stop in ids else ids

    def floor(self, answers: dict) -> dict[str, float]:
        """Return the parts of the floor, in seconds."""
        prompts = [
            (sample.image, tuple(self.replica.inputs(sample)["input_ids"][0].tolist())) for sample in self.samples
        ]
        by_set = {removed: [answers[sample.id, removed] for sample in self.samples] for removed in self.sets}
        return floor_parts(self.replica.model, prompts, by_set)


def run(name: str, contest: Contest, repeats: int, threads: list[int]) -> dict:
    """Run all ways at every number of threads; print and return the comparison."""
    times: dict[tuple[str, int], float] = {}
    answers: dict[str, dict] = {}
    floors = {}
    for count in threads:
        torch.set_num_threads(count)
        times["single", count], answers["single"] = timed(contest.single)
        times["batched", count], answers["batched"] = timed(contest.batched)
        rounds: dict[str, list[float]] = {way: [] for way in ENGINE}
        for _ in range(repeats):
            for way, seconds in rounds.items():
                contest.prepare(way)
                took, answers[way] = timed(partial(contest.answer, way))
                seconds.append(took)
        times |= {(way, count): statistics.median(seconds) for way, seconds in rounds.items()}
        floors[count] = contest.floor(answers["single"])
        parts = {part: round(value, 3) for part, value in floors[count].items()}
        print(f"{name}, {count} threads: seconds { {w: round(times[w, count], 3) for w in answers} }; floor {parts}")
    reference = answers["single"]
    same = {way: sum(row[key] == reference[key] for key in reference) / len(reference) for way, row in answers.items()}
    follow = _share_followed(reference)
    print(f"{name}: identical to single {same}; tokens that follow the whole model's answer {follow:.3f}", flush=True)
    best = {rival: min(times[rival, count] for count in threads) for rival in ("single", "batched")}
    results = {
        str(count): {
            "speedup_vs_single": round(best["single"] / times["as used", count], 2),
            "speedup_vs_batched": round(best["batched"] / times["as used", count], 2),
            "limit_ratio": round(times["as used", count] / sum(floors[count].values()), 2),
            "over_best": round(
                times["as used", count] / min(times[way, count] for way in ("without drafts", "with drafts")), 3
            ),
        }
        for count in threads
    }
    worst = {
        key: (min if key.startswith("speedup") else max)(each[key] for each in results.values())
        for key in results[str(threads[0])]
    }
    return {**worst, "identical_fraction": same["as used"], "tokens_followed": round(follow, 3), "threads": results}


def _share_followed(answers: dict) -> float:
    """Return what share of the removals' tokens stand before the first that differs from the whole model's answer."""
    followed = total = 0
    for (sample, removed), answer in answers.items():
        whole = answers[sample, ()]
        if removed:
            differing = [place for place, pair in enumerate(zip(answer, whole, strict=False)) if pair[0] != pair[1]]
            followed += differing[0] if differing else min(len(answer), len(whole))
            total += len(answer)
    return followed / total


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=16, help="questions (default: %(default)s)")
    parser.add_argument("--removals", type=int, default=8, help="layers, spread over depth (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default: %(default)s)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="(default: 1 2)")
    parser.add_argument("--models", nargs="+", default=["derm_smol_trained", "derm_smol_untrained", "derm_tiny"])
    parser.add_argument("--max-rows", type=int, default=1024, help="rows of a batch (default: %(default)s)")
    options = parser.parse_args()
    quiet()
    with tempfile.TemporaryDirectory() as text:
        scratch = Path(text)
        results = {}
        for name in options.models:
            folder, smol = scratch / name, name.startswith("derm_smol")
            asked = sentences.QUESTIONS if smol else world.QUESTIONS
            answer = (lambda lesion, q: sentences.answer(lesion, q, 0)) if smol else world.answer
            samples = conversations(folder / "images", WARM + options.samples, asked, answer)
            checkpoint = folder / "model" if smol else DERM_TINY
            if smol:
                build(checkpoint, name.endswith("untrained"), False, None, (0, 0), 0)
            contest = Contest(checkpoint, samples, options.removals, folder, options.max_rows)
            results[name] = run(name, contest, options.repeats, options.threads)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
