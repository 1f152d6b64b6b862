"""What this process takes of a device's memory, in bytes: now, and at its peak. Imports torch only for a GPU.

On a CPU: the resident set, whose high-water mark the kernel keeps; interpreter and libraries are in it, and pages of
mapped files. On the GPUs of this process, summed: allocated and reserved are torch's allocator's; driver is what is
taken on the whole card, context included, and whatever other processes hold: measure where there are none. Of several
GPUs, fullest is the driver's number of the one that holds most.
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
        raise ProcessLookupError(f"process {process} has no memory any more")
    return int(match[1]) * 1024


def taken(device: str) -> dict[str, int]:
    """Return what is taken now, by kind: {"resident"} of a "cpu", {"allocated", "reserved", "driver"} of "cuda".

    And "fullest" where there are several GPUs.
    """
    if device == "cpu":
        return {"resident": resident_bytes()}
    return _on_gpus("memory_allocated", "memory_reserved")


def peak(device: str) -> dict[str, int]:
    """Return the most that was taken since the process began, or since `restart_peak`."""
    if device == "cpu":
        return {"resident": resident_bytes(peak=True)}
    return _on_gpus("max_memory_allocated", "max_memory_reserved")


def restart_peak(device: str) -> bool:
    """Begin a new peak at what is taken now; False where the kernel does not let a process do that."""
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
    """Return what the driver has given on the GPU beyond torch's allocator: context, kernels, other processes."""
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
