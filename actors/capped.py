"""Does a checkpoint answer questions within a memory cap? Tried in a process of its own, which ends at the cap.

On a CPU the resident set counts, interpreter and libraries included. The kernel's own high-water mark decides, so that
no moment escapes; looking at it every few milliseconds only ends the process early. (Limits on addresses, RLIMIT_AS and
RLIMIT_DATA, also count what is reserved and never used, such as mapped files and stacks; a control group needs rights
that few users have.) On a GPU torch's allocator gets the cap less the context, and out of memory ends the process; what
the driver has given must be within the cap at the end, too.
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

        spec.gpus: 1 for a GPU, 0 for the CPU. Returns {fits, cap_bytes, peak_bytes, baseline_bytes, stage, answers}:
        `baseline_bytes` were taken before loading (None: not even that fitted), `stage` is what was being done at the
        end. ValueError: what is wrong with the checkpoint, or a cap above what the device has. RuntimeError: the
        process died of something else.
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
            resident, ended = _watched(folder, None if spec.gpus else cap_bytes)
            progress = _read_notes(folder)
            cry = (folder / "stderr").read_text().strip().splitlines()
        if "error" in progress:
            raise ValueError(progress["error"])
        peak_bytes = progress.pop("peak_bytes", 0) if spec.gpus else max(resident, progress.pop("peak_bytes", 0))
        if ended and (spec.gpus or peak_bytes <= cap_bytes):
            raise RuntimeError(
                f"Whether {spec.path!r} fits in {cap_bytes / GIB:.2f} GiB is not known: its process ended with {ended} "
                f"and {resident / GIB:.2f} GiB of main memory taken ({cry[-1] if cry else 'no message'})."
            )
        fits = progress["stage"] == "done" and peak_bytes <= cap_bytes
        return {**progress, "fits": fits, "cap_bytes": cap_bytes, "peak_bytes": peak_bytes}


def _watched(folder: Path, cap_bytes: int | None) -> tuple[int, int]:
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
    """Return what the process noted about itself, the latest word on each."""
    progress = {"stage": "starting", "answers": 0, "baseline_bytes": None}
    path = folder / "notes"
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    for line in lines:
        progress |= json.loads(line)
    return progress


def _try(folder: Path) -> None:
    """Be the process: load, answer, and note how far it came and what it took."""
    from actors.memory import TooLittleMemory

    request = json.loads((folder / "request").read_text())
    spec = ModelSpec(**request["spec"])
    device = "cuda" if spec.gpus else "cpu"
    with (folder / "notes").open("a", buffering=1) as notes:

        def note(**words) -> None:
            notes.write(json.dumps(words) + "\n")

        try:
            _answer_all(request, spec, device, note)
        except (MemoryError, TooLittleMemory) as error:
            if device == "cpu":  # the machine's own limit, not the cap's
                note(error=str(error))
        except ValueError as error:
            note(error=str(error))
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # torch's own is the answer that was asked for
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
