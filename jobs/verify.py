"""Try a checkpoint as others will use it: does plain transformers load it, and is it what it says?

    python -m jobs.verify --config configs/derm-tiny.yaml --model.path runs/derm-tiny/artifacts/prune-...

Runs by itself after prune, recover and quantize, before their checkpoint is published; by hand it takes any folder.
"""

import json
from pathlib import Path

from actors.specs import ModelSpec
from cluster.artifacts import MANIFEST
from jobs.command import main
from jobs.run import Run, Source, Stage

GATE = "gate"


def passed(run: Run, folder: Path, parent: Stage | Source | None = None, removed: list[int] | None = None) -> dict:
    """Return what the gate found out about a new checkpoint, to be noted in its manifest; ValueError: it is refused.

    removed: `parent` without these layers must give the same logits. parent alone: it was rounded.
    """
    model = run.config.model
    spec = ModelSpec(str(folder), model.dtype, None, model.trust_remote_code)
    with run.worker("actors.gate:Gate") as worker:
        return worker.call("check", spec, run.model_spec(parent) if parent else None, removed, None, True)


def job(run: Run) -> None:
    """Check the folder `model.path` and print what was found."""
    folder = Path(run.config.model.path).expanduser().resolve()
    if not folder.is_dir():
        raise ValueError(f"model.path {run.config.model.path!r} is no folder: give one that holds a checkpoint.")
    manifest = folder / MANIFEST
    sums = json.loads(manifest.read_text()).get(GATE, {}).get("sums") if manifest.is_file() else None
    model = run.config.model
    spec = ModelSpec(str(folder), model.dtype, None, model.trust_remote_code)
    with run.worker("actors.gate:Gate") as worker:
        found = worker.call("check", spec, None, None, sums)
    found["sums"] = "those that were published" if sums else "nothing to compare with"
    for check, said in found.items():
        print(f"{check:<10} {said}")
    print(f"verify: {folder} passes", flush=True)


if __name__ == "__main__":
    main(__doc__, job)
