"""Tells whether a checkpoint answers questions within a memory cap, by trying it in a process that ends at the cap.

On a CPU the cap is on the resident set, interpreter and libraries included. The kernel's high-water mark decides, so
that no short peak is missed; polling it only ends the process early. (RLIMIT_AS and RLIMIT_DATA also count memory that
is reserved and never used, such as mapped files and stacks; a control group needs rights that few users have.) On a GPU
torch's allocator may take the cap less the context, and running out of memory ends the process; at the end all memory
in use on the card must be within the cap, too.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from actors.footprint import context_bytes, peak, resident_bytes, taken
from actors.specs import ModelSpec, Sample

GIB = 2**30
LOOK_EVERY_S = 0.01
_ROOT = Path(__file__).resolve().parent.parent
_KINDS = {"cpu": "resident", "cuda": "driver"}


class Capped:
    """Starts the process and watches it; a worker class that itself never touches a GPU."""

    def answers(self, spec: ModelSpec, samples: Sequence[Sample], max_new_tokens: int, cap_bytes: int) -> dict:
        """Answer the questions one by one with plain `generate` and return whether `cap_bytes` were enough.

        spec.gpus: 1 for a GPU, 0 for the CPU. Returns {fits, cap_bytes, peak_bytes, baseline_bytes, stage, answers}.
        baseline_bytes: in use before loading (None: not even that fitted); stage: what the process did last.
        ValueError: the checkpoint is faulty, or the cap exceeds the device's memory. RuntimeError: the process died
        for another reason.
        """
        request = {
            "spec": asdict(spec),
            "samples": [asdict(sample) for sample in samples],
            "max_new_tokens": max_new_tokens,
            "cap_bytes": cap_bytes,
        }
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "request").write_text(json.dumps(request))
            resident, exit_code = _run_watched(folder, None if spec.gpus else cap_bytes)
            progress = _read_notes(folder)
            errors = (folder / "stderr").read_text().strip().splitlines()
        if "error" in progress:
            raise ValueError(progress["error"])
        peak_bytes = progress.pop("peak_bytes", 0) if spec.gpus else max(resident, progress.pop("peak_bytes", 0))
        if exit_code and (spec.gpus or peak_bytes <= cap_bytes):
            raise RuntimeError(
                f"Cannot tell whether {spec.path!r} fits in {cap_bytes / GIB:.2f} GiB: its process died with exit code "
                f"{exit_code} at {resident / GIB:.2f} GiB of main memory ({errors[-1] if errors else 'no message'})."
            )
        fits = progress["stage"] == "done" and peak_bytes <= cap_bytes
        return {**progress, "fits": fits, "cap_bytes": cap_bytes, "peak_bytes": peak_bytes}


def _run_watched(folder: Path, cap_bytes: int | None) -> tuple[int, int]:
    """Run the process to its end, or to a cap on main memory; return its resident peak (bytes) and exit code."""
    most = 0
    with (folder / "stderr").open("w") as stderr:
        child = subprocess.Popen([sys.executable, "-m", "actors.capped", str(folder)], cwd=_ROOT, stderr=stderr)
        try:
            while child.poll() is None:
                try:
                    most = max(most, resident_bytes(child.pid, peak=True))
                except ProcessLookupError:  # it is ending
                    pass
                if cap_bytes is not None and most > cap_bytes:
                    child.kill()
                time.sleep(LOOK_EVERY_S)
        finally:
            child.kill()
            child.wait()
    return most, child.returncode


def _read_notes(folder: Path) -> dict:
    """Return the process's notes: the latest value of each."""
    progress = {"stage": "starting", "answers": 0, "baseline_bytes": None}
    path = folder / "notes"
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    for line in lines:
        progress |= json.loads(line)
    return progress


def _try(folder: Path) -> None:
    """Run in the process itself: load, answer, and note the progress and the peak."""
    from actors.memory import TooLittleMemory

    request = json.loads((folder / "request").read_text())
    spec = ModelSpec(**request["spec"])
    device = "cuda" if spec.gpus else "cpu"
    with (folder / "notes").open("a", buffering=1) as notes:

        def note(**values) -> None:
            notes.write(json.dumps(values) + "\n")

        try:
            _answer_all(request, spec, device, note)
        except (MemoryError, TooLittleMemory) as error:
            if device == "cpu":  # the machine's own limit, not the cap's
                note(error=str(error))
        except ValueError as error:
            note(error=str(error))
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # out of memory is a result
                raise
        note(peak_bytes=peak(device)[_KINDS[device]])


def _answer_all(request: dict, spec: ModelSpec, device: str, note: Callable[..., None]) -> None:
    from actors.engine.replica import LlavaReplica

    note(stage="loading", baseline_bytes=taken(device)[_KINDS[device]])
    if device == "cuda":
        spec = replace(spec, gpus=_share(request["cap_bytes"]))
    replica = LlavaReplica(spec, max_rows=1)
    parent = os.getppid()
    for number, sample in enumerate(request["samples"], 1):
        note(stage=f"answering question {number} of {len(request['samples'])}")
        replica.generated(Sample(**sample), request["max_new_tokens"])
        note(answers=number)
        if os.getppid() != parent:
            return
    note(stage="done")


def _share(cap_bytes: int) -> float:
    """Return the fraction of the GPU that torch's allocator may take under a cap that counts the context, too."""
    import torch

    total = torch.cuda.mem_get_info()[1]
    if cap_bytes > total:
        raise ValueError(f"profile.cap_gib is {cap_bytes / GIB:g}, but the GPU has {total / GIB:.1f} GiB: lower it.")
    return max(cap_bytes - context_bytes(), 1) / total


if __name__ == "__main__":
    _try(Path(sys.argv[1]))
