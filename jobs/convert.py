"""Convert a checkpoint of another repository's layout into a stock LLaVA, which model.path of all jobs then takes.

python -m jobs.convert BAAI/Bunny-v1_0-3B --out runs/models/bunny

None of the other repository's code is run. docs/checkpoints.md says which layouts are known.
"""

import argparse
from pathlib import Path

from jobs.core.command import one_sentence
from jobs.core.logs import parse_and_configure


def main() -> None:
    """Parse the command line and convert."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="folder or hub id of the checkpoint")
    parser.add_argument("--revision", help="commit, tag or branch of a hub id")
    parser.add_argument("--out", type=Path, required=True, help="folder of the stock checkpoint")
    options = parse_and_configure(parser)
    with one_sentence("convert"):
        build(options.source, options.out, options.revision)


def build(source: str, out: Path, revision: str | None = None) -> None:
    """Write the stock checkpoint to `out`; ValueError: what is wrong with the source, or `out` exists."""
    from actors.checkpoint.conversion import convert
    from actors.checkpoint.loading import quiet

    quiet()
    if out.exists():
        raise ValueError(f"--out {str(out)!r} exists: give another folder, or delete it.")
    convert(source, out, revision)
    print(out)


if __name__ == "__main__":
    main()
