"""Put the public task easy-VQA into a folder as our data code reads it: pictures of shapes, questions, its own split.

    pip install easy-vqa==1.0
    python -m jobs.make_easy_vqa                        # into runs/easy-vqa: 4,000 + 1,000 pictures
    python -m jobs.make_easy_vqa --train 500 --test 100

configs/smol-easy-vqa.yaml has derm-smol learn the task, and says the commands. easy-VQA is by Victor Zhou (MIT).
"""

import argparse
import csv
import importlib.util
import json
import logging
import shutil
from pathlib import Path

from jobs.core.command import one_sentence
from jobs.core.logs import parse_and_configure

LOG = logging.getLogger("jobs")

OUT = Path("runs/easy-vqa")
ANNOTATIONS = "annotations.csv"
PICTURES = {"train": 4000, "test": 1000}


def main() -> None:
    """Parse the command line and write the folder."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.make_easy_vqa", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=OUT, help="folder to write (default: %(default)s)")
    for side, count in PICTURES.items():
        parser.add_argument(
            f"--{side}", type=int, default=count, help=f"pictures for {side} (default: %(default)s, all)"
        )
    options = parse_and_configure(parser)
    with one_sentence("make_easy_vqa"):
        write(options.out, {side: getattr(options, side) for side in PICTURES})


def write(out: Path, counts: dict[str, int]) -> None:
    """Copy the first pictures of each side, and write their questions; ValueError: no package, or a wrong count."""
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or spec.origin is None:
        raise ValueError("easy-VQA comes with the package easy-vqa: pip install easy-vqa==1.0")
    for side, count in counts.items():
        if not 1 <= count <= PICTURES[side]:
            raise ValueError(f"--{side} is {count}: easy-VQA has 1 to {PICTURES[side]} pictures for {side}.")
    if out.exists():
        present = {side: len(list((out / side).glob("*.png"))) for side in counts}
        if present != counts:
            raise ValueError(f"{str(out)!r} holds {present} pictures, not {counts}: give another --out, or remove it.")
        LOG.info(f"make_easy_vqa: {out} exists")
        print(out)
        return
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    rows: list[tuple[str, str, str, str]] = []
    for side, count in counts.items():
        source = Path(spec.origin).parent / "data" / side
        (partial / side).mkdir(parents=True)
        for number in range(count):
            shutil.copyfile(source / "images" / f"{number}.png", partial / side / f"{number}.png")
        questions = json.loads((source / "questions.json").read_text())
        rows += [
            (f"{side}/{image}.png", f"q{number}", text, answer)
            for number, (text, answer, image) in enumerate(questions)
            if image < count
        ]
    with open(partial / ANNOTATIONS, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(("path", "question_id", "question", "answer"))
        table.writerows(rows)
    partial.rename(out)
    LOG.info(f"make_easy_vqa: {sum(counts.values())} pictures, {len(rows)} questions")
    print(out)


if __name__ == "__main__":
    main()
