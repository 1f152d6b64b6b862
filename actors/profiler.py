"""Memory and latency of one loaded model, batch 1, greedy, an exact number of new tokens."""

import resource
import statistics
import time

import torch
from transformers import StoppingCriteria


class _Clock(StoppingCriteria):
    """Notes the time at which every new token is known; never stops the generation."""

    def __init__(self):
        self.ticks: list[float] = []

    def __call__(self, input_ids, scores, **kwargs):
        _synchronise()
        self.ticks.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(model, inputs: dict, warmup_runs: int, timed_runs: int, new_tokens: int) -> dict:
    """Run plain `generate` on one prompt and return its efficiency.

    ms_per_token = (end to end - time to first token) / (new_tokens - 1), the median of `timed_runs`;
    naive_ms_per_token = end to end / new_tokens, which is what the paper's column is. Peak memory (bytes) is
    the allocators' on the GPUs, and the process's largest resident set on a CPU (libraries included).
    """
    first, per_token, naive = [], [], []
    for device in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(device)
    for run in range(warmup_runs + timed_runs):
        clock = _Clock()
        _synchronise()
        start = time.perf_counter()
        model.generate(
            **inputs,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            do_sample=False,
            stopping_criteria=[clock],
        )
        if run < warmup_runs:
            continue
        first.append((clock.ticks[0] - start) * 1e3)
        per_token.append((clock.ticks[-1] - clock.ticks[0]) * 1e3 / (new_tokens - 1))
        naive.append((clock.ticks[-1] - start) * 1e3 / new_tokens)
    return {
        "ms_per_token": statistics.median(per_token),
        "ms_per_token_p5_p95": _p5_p95(per_token),
        "naive_ms_per_token": statistics.median(naive),
        "first_token_ms": statistics.median(first),
        "timed_runs": timed_runs,
        "timed_tokens": new_tokens,
        **_peak_memory(),
        **device_facts(),
    }


def _p5_p95(values: list[float]) -> list[float]:
    if len(values) < 2:
        return [values[0], values[0]]
    cuts = statistics.quantiles(values, n=20, method="inclusive")
    return [cuts[0], cuts[-1]]


def _peak_memory() -> dict:
    if torch.cuda.is_available():
        peak = sum(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count())))
        return {"peak_memory_bytes": peak, "peak_memory_kind": "GPU, allocated"}
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak_memory_bytes": resident, "peak_memory_kind": "process, resident"}


def device_facts() -> dict:
    """Name the device and the thread count that the numbers belong to."""
    if torch.cuda.is_available():
        return {"device": torch.cuda.get_device_name(), "threads": torch.get_num_threads()}
    return {"device": "CPU", "threads": torch.get_num_threads()}
