"""Rebuild the embedded model derm-tiny from scratch: draw, train, plant outliers, test, save.

python -m jobs.make_derm_tiny                      # into actors/derm_tiny/checkpoint, about 8 minutes on two cores
python -m jobs.make_derm_tiny --out my-derm-tiny
"""

import argparse
import logging
from pathlib import Path

from jobs.core.logs import parse_and_configure
from jobs.core.progress import Progress

LOG = logging.getLogger("jobs")

CHECKPOINT = Path(__file__).resolve().parent.parent / "actors" / "derm_tiny" / "checkpoint"
BANK, BANK_SEED, TEST, TEST_SEED = 12_000, 11, 600, 99
OUTLIERS: dict = {"share": 0.15, "factor": 50.0}
CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---
# derm-tiny

A LLaVA of {parameters:,} parameters (CLIP tower 4 x 96, projector, Llama 10 x 64) that answers three questions
about drawings of skin lesions. It exists to exercise Prunella on a laptop: every decoder layer earns its
place, and a few channels are far larger than the rest, so that pruning and 4-bit rounding cost something, as
they do in large models.

**It is not a medical model.** It has never seen a photograph, it knows eight drawn classes, and it must not be
used to judge anybody's skin.

Exact answers on {test} freshly drawn images (seed {seed}), greedy decoding, float16 weights computed in float32:

| question | exact answers |
|---|---|
{rows}

Outliers were planted after training by rescaling ({share:.0%} of the channels, factor {factor:g}), which leaves
the function as it was. Made by `python -m jobs.make_derm_tiny`.
"""


def main() -> None:
    """Parse the command line and build."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.make_derm_tiny", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=CHECKPOINT, help="checkpoint folder (default: %(default)s)")
    parser.add_argument("--tower-steps", type=int, default=900, help="steps of 64 images (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1500, help="steps of 48 conversations (default: %(default)s)")
    options = parse_and_configure(parser)
    build(options.out, options.tower_steps, options.steps)


def build(out: Path, tower_steps: int, steps: int) -> dict[str, float]:
    """Build derm-tiny into `out`; returns the share of exact answers per question."""
    import torch

    from actors.checkpoint.loading import quiet
    from actors.derm_tiny.build import build_model, build_processor, save
    from actors.derm_tiny.train import (
        draw_bank,
        encode_bank,
        plant_outliers,
        to_pixels,
        train_language_model,
        train_tower,
    )

    quiet()
    torch.manual_seed(0)
    processor = build_processor()
    model = build_model(processor)
    LOG.info(f"drawing {BANK:,} images")
    images, lesions = draw_bank(BANK, BANK_SEED)
    pixels = to_pixels(images, processor)
    tower = model.model.vision_tower
    with Progress("vision tower", tower_steps) as progress:
        for row in train_tower(tower, pixels, lesions, tower_steps, batch=64, seed=0):
            progress.at(row["step"], f"loss {row['loss']:.3f} class accuracy {row['accuracy']:.2f}")
    features = encode_bank(tower, pixels)
    with Progress("language model", steps) as progress:
        for row in train_language_model(model, processor, features, lesions, steps, batch=48, seed=0):
            progress.at(row["step"], f"loss {row['loss']:.4f}")
    plant_outliers(model, **OUTLIERS)
    out.mkdir(parents=True, exist_ok=True)
    save(model, processor, out)
    return write_card(out)


def write_card(out: Path) -> dict[str, float]:
    """Test the saved model on fresh images and write its model card; returns the shares of exact answers."""
    from actors.checkpoint.loading import load_model, load_processor
    from actors.derm_tiny.train import exact_share

    model = load_model(str(out))
    shares = exact_share(model, load_processor(str(out)), TEST, TEST_SEED)
    shares["all three"] = sum(shares.values()) / len(shares)
    rows = "\n".join(f"| {question} | {share:.1%} |" for question, share in shares.items())
    parameters = sum(p.numel() for p in model.parameters())
    (out / "README.md").write_text(CARD.format(parameters=parameters, test=TEST, seed=TEST_SEED, rows=rows, **OUTLIERS))
    print(f"{out}: exact answers " + ", ".join(f"{question} {share:.1%}" for question, share in shares.items()))
    return shares


if __name__ == "__main__":
    main()
