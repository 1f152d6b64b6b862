"""A row for all questions about an image against a row for each: the ablation's verifying pass, interleaved.

    make bench-sharing        (python -m tests.benchmarks.sharing --help)

A random LLaVA in float32; three questions about each image, drafts of 20 random tokens, all single removals but those
of the first and the last two layers, one new token. Medians of three rounds; the last line is one JSON object.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch

import actors.engine.packing
from actors.checkpoint.loading import load_model, quiet
from actors.engine.answering import verify_drafts
from actors.engine.steps import Limits
from tests.benchmarks.gpu_ablation import random_prompts
from tests.benchmarks.machine import timed
from tests.benchmarks.quantizers import write_model

TOGETHER = {"a row each": 1, "a row per image": actors.engine.packing.MOST_TOGETHER}


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768, help="hidden size, a multiple of 64 (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=12, help="decoder layers (default: %(default)s)")
    parser.add_argument("--images", type=int, default=3, help="images (default: %(default)s)")
    parser.add_argument("--image-tokens", type=int, default=576, help="tokens of an image (default: %(default)s)")
    given = parser.parse_args()
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        params = write_model(Path(folder), given.width, given.layers)
        model = load_model(folder)
    prompts = list(random_prompts(model, 3 * given.images, given.image_tokens, per_image=3).values())
    drafts = torch.randint(3, 500, (len(prompts), 20), generator=torch.Generator().manual_seed(0)).tolist()
    whole_L = torch.ones(given.layers, dtype=torch.bool)
    keep_VL = ~torch.eye(given.layers, dtype=torch.bool)[1:-2]
    times: dict[str, list[float]] = {way: [] for way in TOGETHER}
    found, tokens = {}, {}
    for _ in range(3):
        for way, together in TOGETHER.items():
            actors.engine.packing.MOST_TOGETHER = together
            seconds, (found[way], counts) = timed(
                lambda: verify_drafts(model, prompts, drafts, whole_L, keep_VL, Limits(1, ()))
            )
            times[way].append(seconds)
            tokens[way] = counts["layer_tokens_run"]
    median = {way: round(statistics.median(values), 3) for way, values in times.items()}
    apart, shared = TOGETHER
    same = [one == other for one, other in zip(found[apart], found[shared], strict=True)]
    result = {
        "params": params,
        "threads": torch.get_num_threads(),
        "seconds": median,
        "speedup": round(median[apart] / median[shared], 2),
        "fewer_tokens": round(tokens[apart] / tokens[shared], 2),
        "identical_fraction": sum(same) / len(same),
    }
    print(json.dumps({"benchmark": "sharing", **vars(given), **result}))


if __name__ == "__main__":
    main()
