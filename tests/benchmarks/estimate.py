"""The estimate against measured peaks: derm-tiny and a random LLaVA, original and quantized, a fresh process each.

    python -m tests.benchmarks.estimate                  on two cores: some minutes
    python -m tests.benchmarks.estimate --width 4096 --layers 8    on a GPU, where it is measured by torch's allocator

On a CPU two peaks are given. `allocated`: weights in memory and every allocation of the modules (tests.allocations),
what torch's allocator would report on a GPU. `resident`: the process's peak beyond what interpreter and libraries took
before loading; libraries that wake up meanwhile, and pages of mapped files, are in it. On a GPU allocated is measured.
Errors are (estimate - measured) / measured. The last line is JSON.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig

from actors.engine.replica import LlavaReplica
from actors.estimate import Setting, estimate, uniform
from actors.images import QUESTION, probe_image
from actors.specs import ModelSpec, Sample
from tests.allocations import generated
from tests.benchmarks.quantizers import write_model
from tests.quantizing import quantize
from tests.tiny import DERM_TINY

METHODS = {"none": 16, "int8": 8, "nf4": 4, "hqq": 4, "rtn": 4}
MIB = 2**20


def measure(path: str, source: str, method: str, tokens: int) -> dict:
    """Load a checkpoint in this process, answer one question, and return the estimate beside what was taken (MiB)."""
    dtype = "float16" if torch.cuda.is_available() else "float32"
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "probe.png"
        probe_image().save(image)
        sample = Sample("probe", str(image), QUESTION)
        replica = LlavaReplica(ModelSpec(path, dtype))
        found = replica.profile(sample, 1, 2, tokens, "plain")
        inputs = replica._pixels(sample)
        device = replica.device.type
        beyond = None if device == "cuda" else generated(replica.model, inputs, tokens)
    config = AutoConfig.from_pretrained(source)
    layers, size = config.text_config.num_hidden_layers, getattr(torch, dtype).itemsize
    bits = uniform(layers, (), METHODS[method])
    asked = Setting(bits, method, 64, 1, 1, inputs["input_ids"].shape[1], tokens, size, 1)
    expected = estimate(config, asked)
    kind = "allocated" if device == "cuda" else "resident"
    peaks = {kind: found["steady_peak_bytes"][kind] - found["baseline_bytes"][kind]}
    if beyond is not None:
        held = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in _stored(replica.model)}
        peaks["allocated"] = sum(held.values()) + beyond
    row = {"device": found["device"], "dtype": dtype, "params": expected["params"], "tokens": tokens}
    for part in ("weight", "kv_cache", "activation", "total"):
        row[f"{part}_mib"] = round(expected[f"{part}_bytes"] / MIB, 3)
    for kind, taken in peaks.items():
        row[f"{kind}_mib"] = round(taken / MIB, 3)
        row[f"{kind}_error_pct"] = round(100 * (expected["total_bytes"] / taken - 1), 2)
    return row


def _stored(model: torch.nn.Module):
    for module in model.modules():
        for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            yield tensor
            state = getattr(tensor, "quant_state", None)
            yield from (value for value in vars(state).values() if isinstance(value, torch.Tensor)) if state else ()


def in_process(path: Path, source: Path, method: str, tokens: int) -> dict:
    """Measure in a fresh process."""
    given = [str(path), str(source), method, str(tokens)]
    command = [sys.executable, "-m", "tests.benchmarks.estimate", "--only", *given]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(result.stderr[-2000:])
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    """Parse the options, measure all, print a line for each and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024, help="hidden size of the random model (channels)")
    parser.add_argument("--layers", type=int, default=8, help="its decoder layers")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens")
    parser.add_argument("--only", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only:
        print(json.dumps(measure(*given.only[:3], int(given.only[3]))))
        return
    rows = {}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        write_model(root / "wide", given.width, given.layers)
        for name, source in (("derm-tiny", DERM_TINY), ("wide", root / "wide")):
            for method in METHODS:
                path = source if method == "none" else root / f"{name}-{method}"
                if method != "none":
                    quantize(str(source), path, method)
                rows[f"{name} {method}"] = in_process(path, source, method, given.tokens)
                print(f"{name:<10} {method:<5} {rows[f'{name} {method}']}", flush=True)
    print(json.dumps({"benchmark": "estimate", "width": given.width, "layers": given.layers, "rows": rows}))


if __name__ == "__main__":
    main()
