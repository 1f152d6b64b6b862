"""Check a checkpoint as others will use it: does plain transformers load it, and is it what its config says?

    python -m jobs.verify --config configs/derm-tiny.yaml --model.path runs/derm-tiny/artifacts/prune-...
    python -m jobs.verify --model.path /models/any-llava --model.dtype float16

Takes any folder that holds a LLaVA checkpoint. Exits 0 if it passes; 1 if it is refused, with one sentence that names
the wrong tensor, module or file. Tensors are compared with their SHA-256 if the folder records it (artifacts and
published copies do). prune, recover and quantize run the same check on every checkpoint that they make.
"""

from collections.abc import Sequence
from pathlib import Path

from actors.specs import Change, GateError, ModelSpec
from actors.training.settings import Trained
from jobs.core.command import main
from jobs.core.run import Run
from jobs.core.stage import Source, Stage
from jobs.reporting import card


class Refused(RuntimeError):
    """The gate refuses a checkpoint."""


def verify_change(
    run: Run,
    folder: Path,
    parent: Stage | Source,
    change: Change,
    removed: Sequence[int] = (),
    trained: Trained | None = None,
) -> dict:
    """Return the gate's findings on a new checkpoint, for its manifest; Refused: what is wrong.

    change: how it was made from `parent`; removed: the layers that pruning took, zero-based; trained: what may differ.
    """
    return _verify(run, folder, run.model_spec(parent), change, list(removed), None, True, trained)


def verify_checkpoint(run: Run, folder: Path) -> dict:
    """Return the gate's findings on an existing checkpoint, its sums included; Refused: what is wrong."""
    return _verify(run, folder, None, None, (), recorded_sums(folder), False)


def recorded_sums(folder: Path) -> dict[str, str] | None:
    """Return the SHA-256 of a checkpoint's tensors by name, as its folder records them; None: it does not."""
    record = card.record(folder)
    return record.get("gate", record).get("sums")


def require_folder(run: Run) -> Path:
    """Return the folder model.path; ValueError: it is not a folder."""
    folder = Path(run.config.model.path).expanduser().resolve()
    if not folder.is_dir():
        raise ValueError(f"model.path {run.config.model.path!r} is not a folder: give one that holds a checkpoint.")
    return folder


def _verify(run: Run, folder: Path, *arguments) -> dict:
    model = run.config.model
    spec = ModelSpec(str(folder), model.dtype, None, model.trust_remote_code)
    with run.workers.worker("actors.gate.check:Gate") as worker:
        try:
            return worker.call("check", spec, *arguments)
        except GateError as error:
            raise Refused(f"The checkpoint {str(folder)!r} is refused: {error}") from error


def job(run: Run) -> None:
    """Check the folder `model.path` and print the findings."""
    folder = require_folder(run)
    findings = verify_checkpoint(run, folder)
    findings["sums"] = "equal to the recorded ones" if recorded_sums(folder) else "none recorded"
    for check, finding in findings.items():
        print(f"{check:<10} {finding}")
    print(f"verify: {folder} passes", flush=True)


if __name__ == "__main__":
    main(__doc__, job)
