"""The memory in use, now and at its peak, in bytes. Imports torch only for a GPU.

CPU: `resident` is this process's resident set, with interpreter, libraries and pages of mapped files; the kernel keeps
its high-water mark. GPUs, summed over those of this process: `allocated` and `reserved` are torch's allocator's;
`driver` is all memory in use on the card, that of the context and of other processes included: measure on a GPU that
nobody else uses. With several GPUs, `fullest` is `driver` of the fullest one.
"""

import re
from pathlib import Path

KINDS = {"cpu": ("process", "resident"), "cuda": ("GPU", "allocated")}  # the one number for a table


def resident_bytes(process: int | str = "self", peak: bool = False) -> int:
    """Return a process's resident set, or its peak; ProcessLookupError if it is gone."""
    try:
        text = Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        text = ""
    match = re.search(rf"^{'VmHWM' if peak else 'VmRSS'}:\s+(\d+) kB", text, re.MULTILINE)
    if match is None:
        raise ProcessLookupError(f"process {process} is gone")
    return int(match[1]) * 1024


def taken(device: str) -> dict[str, int]:
    """Return the bytes in use now, by kind: "resident" of a "cpu"; "allocated", "reserved", "driver" of "cuda".

    With several GPUs "fullest", too.
    """
    if device == "cpu":
        return {"resident": resident_bytes()}
    return _on_gpus("memory_allocated", "memory_reserved")


def peak(device: str) -> dict[str, int]:
    """Return the largest values of `taken` since the process began, or since `restart_peak`."""
    if device == "cpu":
        return {"resident": resident_bytes(peak=True)}
    return _on_gpus("max_memory_allocated", "max_memory_reserved")


def restart_peak(device: str) -> bool:
    """Reset the peak to the bytes in use now; return False where the kernel does not allow it."""
    if device == "cpu":
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return False
        return True
    import torch

    torch.cuda.empty_cache()
    for number in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(number)
    return True


def context_bytes() -> int:
    """Return the bytes in use on the GPU outside torch's allocator: context, kernels, other processes."""
    now = taken("cuda")
    return now["driver"] - now["reserved"]


def _on_gpus(allocated: str, reserved: str) -> dict[str, int]:
    import torch

    sums, drivers = {"allocated": 0, "reserved": 0}, []
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        reserved_bytes = getattr(torch.cuda, reserved)(number)
        sums["allocated"] += getattr(torch.cuda, allocated)(number)
        sums["reserved"] += reserved_bytes
        drivers.append(total - free - torch.cuda.memory_reserved(number) + reserved_bytes)
    return {**sums, **({"fullest": max(drivers)} if len(drivers) > 1 else {}), "driver": sum(drivers)}
