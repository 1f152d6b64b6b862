"""The engine against its rivals: the same samples and removals in one run, interleaved, medians.

    make bench-ablation        (python -m tests.benchmarks.ablation --help)

(a) the authors' way: a physically pruned model per removal, one question at a time, plain `generate`;
(b) the strongest simple loop: one removal at a time, all questions in one padded batch, plain `generate`;
(c) the engine without drafts; (d) the engine as jobs.ablate uses it: the whole model's answers are first guessed to be
the references, and become the drafts of all removals. On two models: derm-tiny, in which layers matter, and
derm-tiny with most layers' contributions shrunk, in which they do not. Loading is not timed. The floor is the
engine's arithmetic at the measured matmul rate plus its decoded weights at the measured memory bandwidth.
The last line is one JSON object.
"""

import argparse
import csv
import json
import statistics
import tempfile
from pathlib import Path

from actors.checkpoint.loading import load_model, load_processor, quiet
from actors.checkpoint.pruning import prune_checkpoint
from actors.checkpoint.tensors import copy_companions, iterate_tensors, write_tensors
from actors.conversations import reply_ids
from actors.derm_tiny.draw import write_tree
from actors.derm_tiny.world import CLASSES, QUESTIONS
from actors.engine.replica import LlavaReplica
from actors.images import open_image
from actors.specs import Conversation, ModelSpec
from tests.benchmarks.machine import floor_s, timed

DERM_TINY = Path(__file__).resolve().parents[2] / "actors" / "derm_tiny" / "checkpoint"
TOKENS = 48


def indifferent_copy(folder: Path) -> Path:
    """Write derm-tiny with layers 1 to 8 adding a thousandth of what they add: removing one changes nothing."""
    copy_companions(DERM_TINY, folder)
    (folder / "config.json").write_text((DERM_TINY / "config.json").read_text())
    shrunk = [
        f"layers.{layer}.{part}.weight" for layer in range(1, 9) for part in ("self_attn.o_proj", "mlp.down_proj")
    ]

    def tensors():
        for name, tensor in iterate_tensors(DERM_TINY):
            if "language_model" in name and any(name.endswith(end) for end in shrunk):
                tensor = tensor * 0.001
            yield name, tensor

    write_tensors(folder, tensors())
    return folder


def conversations(root: Path, count: int) -> list[Conversation]:
    """Return `count` questions, with references, about as few images of a drawn tree as they take."""
    with open(root / "annotations.csv") as file:
        described = {root / row["path"]: row["answer"] for row in csv.DictReader(file)}
    kinds = {kind.folder: kind for kind in CLASSES}
    made = []
    for path in sorted(described, key=lambda path: (path.stem[-5:], path)):
        kind = kinds[path.parent.name]
        references = {"name": f"This is {kind.name}.", "about": kind.about, "describe": described[path]}
        made += [Conversation(f"{path.stem}-{q}", str(path), QUESTIONS[q], references[q]) for q in QUESTIONS]
    return made[:count]


class Contest:
    """One model, its physically pruned versions, and the four ways to answer the same questions."""

    def __init__(self, checkpoint: Path, samples: list[Conversation], scratch: Path, max_rows: int):
        self.samples = samples
        self.replica = LlavaReplica(ModelSpec(str(checkpoint)), max_rows)
        self.processor = load_processor(str(checkpoint))
        self.sets = [(layer,) for layer in range(self.replica.layer_count())]
        self.pruned = {}
        for removed in self.sets:
            out = scratch / f"{checkpoint.name}-{removed[0]}"
            prune_checkpoint(str(checkpoint), str(out), removed)
            self.pruned[removed] = load_model(str(out))

    def single(self) -> dict:
        """(a) One removal and one question at a time."""
        found = {}
        for removed, model in self.pruned.items():
            for sample in self.samples:
                inputs = self.replica.inputs(sample)
                out = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
                found[sample.id, removed] = self._trim(out[0, inputs["input_ids"].shape[1] :].tolist())
        return found

    def batched(self) -> dict:
        """(b) One removal at a time, all questions in one padded batch."""
        found = {}
        texts = []
        for sample in self.samples:
            content = [{"type": "image"}, {"type": "text", "text": sample.question}]
            turn = [{"role": "user", "content": content}]
            texts.append(self.processor.apply_chat_template(turn, add_generation_prompt=True))
        for removed, model in self.pruned.items():
            images = [open_image(sample.image) for sample in self.samples]
            made = self.processor(images=images, text=texts, return_tensors="pt", padding=True, padding_side="left")
            inputs = {key: made[key] for key in ("input_ids", "attention_mask", "pixel_values")}
            out = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
            for sample, row in zip(self.samples, out[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
                found[sample.id, removed] = self._trim(row)
        return found

    def without_drafts(self) -> dict:
        """(c) The engine with empty drafts."""
        return self._engine([[] for _ in self.samples])

    def with_drafts(self) -> dict:
        """(d) The engine as it is used."""
        guesses = [reply_ids(self.processor.tokenizer, sample.reference) for sample in self.samples]
        return self._engine(None, guesses)

    def _engine(self, drafts, guesses=None) -> dict:
        self.replica._features.clear()  # the images count, as they do for the others
        self.replica.counts.clear()
        rows = self.replica.answers(self.samples, self.sets, TOKENS, (), drafts, guesses)
        return {(row["sample_id"], tuple(row["removed"])): row["token_ids"] for row in rows}

    def _trim(self, ids: list[int]) -> list[int]:
        stop = self.processor.tokenizer.eos_token_id
        return ids[: ids.index(stop) + 1] if stop in ids else ids

    def floor_s(self) -> float:
        """Seconds that the engine's own work with drafts takes at this machine's measured rates."""
        layer, layers = self.replica.model.model.language_model.layers[0], self.replica.layer_count()
        answer = statistics.mean(len(row) for row in self.with_drafts().values())
        return floor_s(layer, self.replica.counts["layer_tokens_run"], answer * layers)


def run(name: str, contest: Contest, repeats: int) -> dict:
    """Run the four ways interleaved; print and return the comparison."""
    ways = {"single": contest.single, "batched": contest.batched, "c": contest.without_drafts, "d": contest.with_drafts}
    times: dict[str, list[float]] = {way: [] for way in ways}
    found = {}
    for _ in range(repeats):
        for way, answer in ways.items():
            seconds, found[way] = timed(answer)
            times[way].append(seconds)
    counts = dict(contest.replica.counts)
    median = {way: statistics.median(values) for way, values in times.items()}
    reference = found["single"]
    same = {way: sum(found[way][key] == reference[key] for key in reference) / len(reference) for way in ways}
    result = {
        "speedup_vs_single": round(median["single"] / median["d"], 2),
        "speedup_vs_batched": round(median["batched"] / median["d"], 2),
        "identical_fraction": same["d"],
        "rows_verified_whole": round(counts["rows_verified_whole"] / counts["rows"], 4),
        "limit_ratio": round(median["d"] / contest.floor_s(), 2),
    }
    seconds = {way: round(value, 3) for way, value in median.items()}
    print(f"{name}: seconds {seconds}, identical to single {same}, {result}", flush=True)
    return result


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=24, help="questions (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default: %(default)s)")
    parser.add_argument("--max-rows", type=int, default=1024, help="rows of a batch (default: %(default)s)")
    options = parser.parse_args()
    quiet()
    with tempfile.TemporaryDirectory() as text:
        scratch = Path(text)
        write_tree(scratch / "images", 8, seed=8)
        samples = conversations(scratch / "images", options.samples)
        models = {"layers matter": DERM_TINY, "layers do not matter": indifferent_copy(scratch / "indifferent")}
        results = {
            name: run(name, Contest(path, samples, scratch / name, options.max_rows), options.repeats)
            for name, path in models.items()
        }
    print(json.dumps({**results["layers matter"], "layers_do_not_matter": results["layers do not matter"]}))


if __name__ == "__main__":
    main()
