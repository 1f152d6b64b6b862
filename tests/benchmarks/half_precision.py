"""Half precision: how often the engine's answers are those of plain pruned models, and whether the others are ties.

    make bench-half        (python -m tests.benchmarks.half_precision --help)

derm-tiny in float16 and in bfloat16, all of the model and every single removal, up to 48 new tokens. The engine
answers in batches, plain `generate` one question at a time on physically pruned models. Ratio: the exact gap between
the two tokens of a mismatch over the logits' rounding error there; rounding alone explains ratios up to 2. The
last line is one JSON object.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from actors.checkpoint.loading import quiet
from actors.derm_tiny.draw import write_tree
from actors.derm_tiny.world import QUESTIONS
from actors.specs import Sample
from tests.benchmarks.ablation import DERM_TINY, TOKENS
from tests.ties import compare

LAYERS = 10


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=24, help="questions (default: %(default)s)")
    options = parser.parse_args()
    quiet()
    results = {}
    with tempfile.TemporaryDirectory() as text:
        scratch = Path(text)
        write_tree(scratch / "images", 8, seed=8)
        paths = sorted((scratch / "images").rglob("*-a.png"), key=lambda path: (path.stem[-5:], path))
        samples = [Sample(f"{p.stem}-{q}", str(p), words) for p in paths for q, words in QUESTIONS.items()]
        samples = samples[: options.samples]
        sets = [(), *((layer,) for layer in range(LAYERS))]
        for dtype in ("float16", "bfloat16"):
            start = time.perf_counter()
            count, found = compare(str(DERM_TINY), scratch / dtype, dtype, samples, sets, TOKENS)
            results[dtype] = {
                "answers": count,
                "identical_fraction": round(1 - len(found) / count, 4),
                "mismatches": len(found),
                "mismatches_that_are_ties": sum(each.is_tie for each in found),
                "largest_ratio": round(max((each.ratio for each in found), default=0.0), 3),
            }
            print(f"{dtype}: {results[dtype]}, {time.perf_counter() - start:.0f} s", flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
