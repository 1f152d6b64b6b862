"""The judge's loop: does the driver keep an engine busy?

    make bench-judge        (python -m tests.benchmarks.judge_loop --help)

The engine is a mock of known speed: it answers `--concurrency` calls at a time, each after `--delay` seconds +-50 %,
i.e. concurrency / delay verdicts per second. Both sides run in turns, `--repeats` times, after a warm-up: the engine
asked by bare tasks with calls made beforehand, and jobs.judging.asking from texts to verdicts on disk (keys, ladder,
parsing, store). Reported: the known speed, the medians, their ratios, the driver's processor time per verdict, and the
most verdicts per second (with an engine that takes no time). The last line is one JSON object.
"""

import argparse
import asyncio
import contextlib
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from actors.judge.ladder import RUNGS, request
from jobs.judging.asking import verdicts
from tests.jobs.judging import Mock, run_in


def texts(count: int) -> list[tuple[str, str, str]]:
    """Return different answers of the length of real ones."""
    question = "What are the clinical features of this disease?"
    reference = "Psoriasis shows sharply bounded red plaques with silvery scales, often on elbows, knees and scalp."
    return [(question, reference, f"It shows plaque number {n} with scales, often on the knees.") for n in range(count)]


def bare(count: int, concurrency: int, delay: float) -> float:
    """Return the seconds that the engine takes for `count` calls made beforehand."""
    mock, calls = Mock(delay=delay), iter([request(*text, RUNGS[0]) for text in texts(count)])

    async def work() -> None:
        for call in calls:
            await mock.ask(call)

    async def everything() -> float:
        began = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(concurrency)))
        return time.perf_counter() - began

    return asyncio.run(everything())


def whole(count: int, concurrency: int, delay: float) -> tuple[float, float]:
    """Return the seconds, and this process's processor seconds, of the job's loop."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        Mock(delay=delay).install(patch)
        run = run_in(Path(folder), ("judge.concurrency", str(concurrency)))
        began, cpu = time.perf_counter(), time.process_time()
        with contextlib.redirect_stdout(io.StringIO()):
            found, _ = verdicts(run, texts(count))
        took = time.perf_counter() - began, time.process_time() - cpu
    if sum(one.verdict.scored for one in found.values()) != count:
        raise RuntimeError("A verdict is missing.")
    return took


def measure(count: int, concurrency: int, delay: float, repeats: int) -> dict:
    """Run both sides in turns."""
    sides: dict[str, Callable[[], float]] = {
        "bare": lambda: bare(count, concurrency, delay),
        "job": lambda: whole(count, concurrency, delay)[0],
    }
    rates: dict[str, list[float]] = {name: [] for name in sides}
    whole(concurrency, concurrency, 0.0)  # the warm-up
    for _ in range(repeats):
        for name, side in sides.items():
            rates[name].append(count / side())
            print(f"{name}: {rates[name][-1]:.1f} verdicts per second", flush=True)
    at_most, cpu = whole(count, concurrency, 0.0)
    known, rate = concurrency / delay, {name: statistics.median(values) for name, values in rates.items()}
    return {
        "verdicts": count,
        "concurrency": concurrency,
        "delay_s": delay,
        "known_per_s": round(known, 1),
        "bare_per_s": round(rate["bare"], 1),
        "job_per_s": round(rate["job"], 1),
        "job_of_known": round(rate["job"] / known, 3),
        "job_of_bare": round(rate["job"] / rate["bare"], 3),
        "driver_ms_per_verdict": round(1000 * cpu / count, 3),
        "most_per_s": round(count / at_most),
    }


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verdicts", type=int, default=3840, help="different answers (default: %(default)s)")
    parser.add_argument("--concurrency", type=int, default=64, help="calls at a time (default: %(default)s)")
    parser.add_argument("--delay", type=float, default=0.5, help="seconds of a call (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default: %(default)s)")
    options = parser.parse_args()
    print(json.dumps(measure(options.verdicts, options.concurrency, options.delay, options.repeats)))


if __name__ == "__main__":
    main()
