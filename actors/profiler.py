"""Latency of one loaded model by phases: batch 1, greedy, an exact number of new tokens, synchronised clocks."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import transformers

from actors.maths.latency import run_times
from actors.specs import Llava

Decoder = Callable[[dict, int, Callable[[], None]], list[int]]


def measure(
    model: Llava,
    prepare: Callable[[], dict],
    decoder: Decoder,
    warmup_runs: int,
    timed_runs: int,
    new_tokens: int,
) -> list[dict[str, float]]:
    """Return the times of every timed run (ms, see `run_times`), after `warmup_runs` runs that are discarded.

    prepare: makes the prompt's tensors on the device from the image; it is timed separately. RuntimeError: the decoder
    does not return `new_tokens` tokens.
    """
    runs = []
    with _encoder_times(model) as encoder_times:
        for run in range(warmup_runs + timed_runs):
            encoder_times.clear()
            ticks: list[float] = []
            started = _now()
            inputs = prepare()
            prepared = _now()
            ids = decoder(inputs, new_tokens, partial(_note, ticks))
            if not len(ids) == len(ticks) == new_tokens:
                raise RuntimeError(f"The decoder returned {len(ids)} tokens instead of {new_tokens}.")
            if run >= warmup_runs:
                begin, end = encoder_times
                runs.append(run_times(started, prepared, end - begin, ticks))
    return runs


@contextmanager
def _encoder_times(model: Llava) -> Iterator[list[float]]:
    """Yield a list that gets the clock when the tower begins and when the projector ends."""
    times: list[float] = []
    hooks = [
        model.model.vision_tower.register_forward_pre_hook(lambda *_: _note(times)),
        model.model.multi_modal_projector.register_forward_hook(lambda *_: _note(times)),
    ]
    try:
        yield times
    finally:
        for hook in hooks:
            hook.remove()


def _note(times: list[float]) -> None:
    times.append(_now())


def _now() -> float:
    for number in range(torch.cuda.device_count()):
        torch.cuda.synchronize(number)
    return time.perf_counter()


def device_facts() -> dict:
    """Name the device, the thread count and the library versions that the numbers belong to."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"device": device, "threads": torch.get_num_threads(), **versions}
