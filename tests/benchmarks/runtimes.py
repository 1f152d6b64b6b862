"""Speed and memory of one checkpoint in transformers and, exported, in llama.cpp: the same question, in turn.

    make bench-runtimes        (python -m tests.benchmarks.runtimes --help)

Every round runs each side once, in a fresh process with one thread. Times are medians over the runs of all rounds,
batch 1, greedy. Time to the first token begins with the image in memory on both sides: as a picture on transformers'
side, as a PNG in a request on llama.cpp's. Memory is the whole process's: its resident set's peak while it answers, and
the peak with loading, in which pages of the mapped file count. The last line is one JSON object: a row for each runtime
and type.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from actors.engine.replica import LlavaReplica
from actors.export import llama_cpp
from actors.export.exporter import ROOM, Exporter
from actors.export.gguf_export import MMPROJ, model_file
from actors.images import probe_image
from actors.maths.latency import p5_p95
from actors.specs import ExportSettings, ModelSpec, Sample

QUESTION = "Which disease does this picture show, and how can you tell?"
TYPES = ("Q4_0", "Q8_0", "F16")
DTYPES = ("float32", "bfloat16", "float16")
MIB = 2**20
PROMPT = 1024  # tokens of context for prompt and images


def transformers_round(path: str, dtype: str, sample: Sample, warmup: int, runs: int, tokens: int) -> dict:
    """Measure transformers in this process."""
    torch.set_num_threads(1)
    replica = LlavaReplica(ModelSpec(path, dtype, gpus=0), max_rows=1)
    found = replica.profile(sample, warmup, runs, tokens, "plain")
    times = [
        {"first_token_ms": r["preprocess_ms"] + r["first_token_ms"], "ms_per_token": r["ms_per_token"]}
        for r in found["runs"]
    ]
    return {
        "runs": times,
        "load_peak_bytes": found["load_peak_bytes"]["resident"],
        "steady_peak_bytes": found["steady_peak_bytes"]["resident"],
    }


def in_fresh_process(request: dict) -> dict:
    """Return what `transformers_round` finds in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.runtimes", "--child", json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def row(runtime: str, kind: str, rounds: list[dict]) -> dict:
    """Return one side's row: medians (ms), 5th and 95th percentiles, and the largest peaks (bytes)."""
    found: dict = {"runtime": runtime, "type": kind}
    for name in ("ms_per_token", "first_token_ms"):
        values = [run[name] for each in rounds for run in each["runs"]]
        found |= {name: statistics.median(values), f"{name}_p5_p95": p5_p95(values)}
    for name in ("steady_peak_bytes", "load_peak_bytes"):
        found[name] = max(each[name] for each in rounds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/models/derm-smol", help="checkpoint folder (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=4, help="timed runs of each process (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of each run (default: %(default)s)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        request = json.loads(options.child)
        print(json.dumps(transformers_round(**request | {"sample": Sample(**request["sample"])})))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        probe_image().resize((336, 336)).save(folder / "image.png")
        sample, rounds = Sample("probe", str(folder / "image.png"), QUESTION), {}
        for kind in TYPES:
            Exporter().write(ModelSpec(options.model), ExportSettings("gguf", kind, "last"), "a model", None, name)
        for _ in range(options.rounds):
            for dtype in DTYPES:
                request = {"path": options.model, "dtype": dtype, "sample": asdict(sample), "warmup": 1}
                found = in_fresh_process(request | {"runs": options.runs, "tokens": options.tokens})
                rounds.setdefault(("transformers", dtype), []).append(found)
            for kind in TYPES:
                files = llama_cpp.Files(
                    str(folder / model_file(kind)), str(folder / MMPROJ), PROMPT + options.tokens + ROOM
                )
                prompt = llama_cpp.Prompt(sample.image, QUESTION)
                found = llama_cpp.measure(files, prompt, 1, options.runs, options.tokens)
                rounds.setdefault(("llama.cpp", kind), []).append(found)
    rows = [row(*side, found) for side, found in rounds.items()]
    for each in rows:
        low, high = each["ms_per_token_p5_p95"]
        steady, loading = (each[name] / MIB for name in ("steady_peak_bytes", "load_peak_bytes"))
        print(
            f"{each['runtime']:<12} {each['type']:<8} {each['ms_per_token']:8.2f} ms/token [{low:.2f}, {high:.2f}]  "
            f"first token {each['first_token_ms']:7.1f} ms  resident {steady:.1f} MiB, loading {loading:.1f} MiB"
        )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
