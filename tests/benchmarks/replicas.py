"""Many replicas: does the driver keep them busy, and do two on one machine do the work of two?

    make bench-replicas        (python -m tests.benchmarks.replicas --help)

simulate: replicas that sleep, as many as `--replicas`, and units of `--sleep` seconds +-50 %. Starting them is not
timed. Efficiency is the sum of the sleeps over replicas x seconds; the driver's cost is its processor time per unit,
measured while they sleep; its most units per second are those of units that do nothing.
two-replicas: one pool of one LlavaReplica and one of two, on derm-tiny, one core and one thread each; the same units
of 4 questions x all single removals, after a warm-up, in interleaved rounds; medians.
Without a part's name both run. The last line is one JSON object.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from actors.derm_tiny.draw import write_tree
from actors.derm_tiny.world import QUESTIONS
from actors.specs import ModelSpec, Sample
from cluster.connection import connect
from cluster.pool import Pool, Resources

DERM_TINY = Path(__file__).resolve().parents[2] / "actors" / "derm_tiny" / "checkpoint"
TOKENS = 48


class Sleeper:
    """A replica that only takes time."""

    def meet(self, folder: str, count: int) -> None:
        """Return when `count` replicas are here."""
        (Path(folder) / str(os.getpid())).touch()
        while len(os.listdir(folder)) < count:
            time.sleep(0.1)

    def work(self, seconds: float) -> float:
        """Sleep."""
        time.sleep(seconds)
        return seconds


def together(pool: Pool, replicas: int) -> None:
    """Start all replicas of a pool of sleepers."""
    with tempfile.TemporaryDirectory() as folder:
        for outcome in pool.map("meet", [(n, (folder, replicas)) for n in range(replicas)]):
            if outcome.error:
                raise RuntimeError(outcome.error)


def simulate(replicas: int, units: int, sleep_s: float) -> dict:
    """Measure how well sleeping replicas are kept busy."""
    draw = random.Random(8)
    sleeps = [sleep_s * draw.uniform(0.5, 1.5) for _ in range(units)]
    with connect(), Pool(f"{__spec__.name}:Sleeper", {}, Resources(cpus=0.01, count=replicas)) as pool:
        began = time.perf_counter()
        together(pool, replicas)
        print(f"simulate: {replicas} replicas started in {time.perf_counter() - began:.0f} s", flush=True)
        wall, cpu = _timed(pool, sleeps)
        at_most, cpu_at_most = _timed(pool, [0.0] * units)
    return {
        "replicas": replicas,
        "units": units,
        "mean_sleep_s": round(sum(sleeps) / units, 3),
        "wall_s": round(wall, 1),
        "efficiency": round(sum(sleeps) / (replicas * wall), 3),
        "driver_ms_per_unit": round(1000 * cpu / units, 3),
        "units_per_s_at_most": round(units / at_most),
        "driver_ms_per_unit_at_most": round(1000 * cpu_at_most / units, 3),
    }


def _timed(pool: Pool, sleeps: list[float]) -> tuple[float, float]:
    """Return the seconds, and this process's processor seconds, of one map."""
    began, cpu = time.perf_counter(), time.process_time()
    done = [outcome.value for outcome in pool.map("work", [(n, (s,)) for n, s in enumerate(sleeps)])]
    took = time.perf_counter() - began, time.process_time() - cpu
    if sorted(done) != sorted(sleeps):
        raise RuntimeError("A unit is missing.")
    return took


def two_replicas(units: int, repeats: int) -> dict:
    """Measure the units per second of one and of two replicas of derm-tiny."""
    with tempfile.TemporaryDirectory() as text, connect(cpus=4):
        folder = Path(text)
        write_tree(folder, 8, seed=8)
        paths = sorted(folder.rglob("*-a.png"), key=lambda path: (path.stem[-5:], path))
        samples = [Sample(f"{p.stem}-{q}", str(p), words) for p in paths for q, words in QUESTIONS.items()]
        sets = [(), *((layer,) for layer in range(10))]
        work = [(n, (samples[n * 4 : n * 4 + 4], sets, TOKENS)) for n in range(min(units, len(samples) // 4))]
        kwargs = {"spec": ModelSpec(str(DERM_TINY)), "max_rows": 1024}
        with (
            Pool("actors.engine.replica:LlavaReplica", kwargs, Resources(count=1)) as one,
            Pool("actors.engine.replica:LlavaReplica", kwargs, Resources(count=2)) as two,
        ):
            rates: dict[str, list[float]] = {"one": [], "two": []}
            for round_ in range(repeats + 1):
                for name, pool in (("one", one), ("two", two)):
                    began = time.perf_counter()
                    failed = [outcome.error for outcome in pool.map("answers", work) if outcome.error]
                    if failed:
                        raise RuntimeError(failed[0])
                    if round_:  # the first is the warm-up
                        rates[name].append(len(work) / (time.perf_counter() - began))
    median = {name: statistics.median(values) for name, values in rates.items()}
    print(f"two-replicas: units per second {rates}", flush=True)
    return {
        "units": len(work),
        "units_per_s": {name: round(rate, 2) for name, rate in median.items()},
        "speedup": round(median["two"] / median["one"], 2),
    }


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=["simulate", "two-replicas"], help="default: both")
    parser.add_argument("--replicas", type=int, default=64, help="sleeping replicas (default: %(default)s)")
    parser.add_argument("--units", type=int, default=10_000, help="units of sleep (default: %(default)s)")
    parser.add_argument("--sleep", type=float, default=0.5, help="mean seconds of a unit (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of two-replicas (default: %(default)s)")
    options = parser.parse_args()
    parts: dict[str, Callable[[], dict]] = {
        "simulate": lambda: simulate(options.replicas, options.units, options.sleep),
        "two-replicas": lambda: two_replicas(24, options.repeats),
    }
    chosen = [options.part] if options.part else list(parts)
    print(json.dumps({name: parts[name]() for name in chosen}))


if __name__ == "__main__":
    main()
