"""Try a checkpoint as others will use it: does plain transformers load it, and is it what it says?

    python -m jobs.verify --config configs/derm-tiny.yaml --model.path runs/derm-tiny/artifacts/prune-...
    python -m jobs.verify --model.path /models/any-llava --model.dtype float16

Takes any folder that holds a LLaVA checkpoint; exits 0 if it passes, 1 if it is refused, and then says in one sentence
which tensor, module or file is wrong. Tensors are compared with their sums where the folder tells them (artifacts and
published copies do). After prune, recover and quantize it runs by itself, before their checkpoint is published.
"""

from collections.abc import Sequence
from pathlib import Path

from actors.specs import Change, GateError, ModelSpec
from jobs.core.command import main
from jobs.core.run import Run
from jobs.core.stage import Source, Stage
from jobs.reporting import card


def verify_change(run: Run, folder: Path, parent: Stage | Source, change: Change, removed: Sequence[int] = ()) -> dict:
    """Return what the gate found out about a new checkpoint, to be noted in its manifest; RuntimeError: it is refused.

    change: how it was made from `parent`; removed: the layers that pruning took, zero-based.
    """
    return _verify(run, folder, run.model_spec(parent), change, list(removed), None, True)


def verify_checkpoint(run: Run, folder: Path) -> dict:
    """Return what the gate finds out about a checkpoint that exists, its sums included; RuntimeError: it is refused."""
    return _verify(run, folder, None, None, (), known_sums(folder), False)


def known_sums(folder: Path) -> dict[str, str] | None:
    """Return the sums of a checkpoint's tensors as its folder tells them."""
    made = card.record(folder)
    return made.get("gate", made).get("sums")


def require_folder(run: Run) -> Path:
    """Return the folder model.path; ValueError: it is none."""
    folder = Path(run.config.model.path).expanduser().resolve()
    if not folder.is_dir():
        raise ValueError(f"model.path {run.config.model.path!r} is no folder: give one that holds a checkpoint.")
    return folder


def _verify(run: Run, folder: Path, *arguments) -> dict:
    model = run.config.model
    spec = ModelSpec(str(folder), model.dtype, None, model.trust_remote_code)
    with run.workers.worker("actors.gate.check:Gate") as worker:
        try:
            return worker.call("check", spec, *arguments)
        except GateError as error:
            raise RuntimeError(f"The checkpoint {str(folder)!r} is refused: {error}") from error


def job(run: Run) -> None:
    """Check the folder `model.path` and print what was found."""
    folder = require_folder(run)
    findings = verify_checkpoint(run, folder)
    findings["sums"] = "those that were published" if known_sums(folder) else "nothing to compare with"
    for check, finding in findings.items():
        print(f"{check:<10} {finding}")
    print(f"verify: {folder} passes", flush=True)


if __name__ == "__main__":
    main(__doc__, job)
