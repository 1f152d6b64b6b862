"""Seconds and peak memory of every quantizer on a random LLaVA, each in a process of its own.

    make bench-quantizers        (python -m tests.benchmarks.quantizers --help)

Memory is counted above what was taken before quantizing, after a warm-up on derm-tiny has imported every library:
peak_bytes is the largest resident set, in which pages of the checkpoint's mapped files count; private_bytes is the
largest set of the process's own pages (USS), looked at every 50 ms. AWQ runs by both searches on the same
conversations, about small drawings: with longer prompts the search of scales, which grows with the tokens, takes a
larger share. A variant that exceeds --limit seconds is stopped and reported as such. autoawq's clipping and hqq are
slow without a GPU: they run on --slow_layers layers; their seconds are multiplied, and the other layers' weights are
added to the memory of autoawq, which holds the whole model. The last line is one JSON object.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from transformers import AutoConfig, LlavaForConditionalGeneration

from actors.derm_tiny.build import build_processor
from actors.derm_tiny.draw import write_tree
from actors.quantizers.quantizer import Quantizer
from actors.specs import ModelSpec, QuantizeSettings
from tests.tiny import DERM_TINY, draw_conversations

VARIANTS = {
    "rtn": ("rtn", 4, ""),
    "nf4": ("nf4", 4, ""),
    "int8": ("int8", 8, ""),
    "awq layerwise": ("awq", 4, "layerwise"),
    "awq autoawq": ("awq", 4, "autoawq"),
    "hqq": ("hqq", 4, ""),
}
SLOW = ("awq autoawq", "hqq")


def write_model(folder: Path, width: int, layers: int) -> int:
    """Save a random float16 LLaVA with derm-tiny's tower, and return its parameters."""
    config = AutoConfig.from_pretrained(DERM_TINY)
    text = config.text_config
    text.hidden_size, text.num_hidden_layers = width, layers
    text.intermediate_size = 64 * round(2.75 * width / 64)  # Llama's proportion
    text.num_attention_heads = text.num_key_value_heads = width // 64
    text.head_dim = 64
    torch.manual_seed(0)
    config.dtype = torch.float16
    model = LlavaForConditionalGeneration(config).half()
    model.save_pretrained(folder)
    build_processor().save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def measure(variant: str, model: str, images: str, samples: int) -> dict:
    """Quantize `model` in this process and return {seconds, peak_bytes, private_bytes, linears, bits_per_weight}."""
    method, bits, search = VARIANTS[variant]
    settings = QuantizeSettings(method, bits, group_size=64, clip=True, awq_search=search)
    conversations = draw_conversations(Path(images), samples)
    process = psutil.Process()
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as out:
        Quantizer().quantize(ModelSpec(str(DERM_TINY)), settings, conversations[:4], first)
        Path("/proc/self/clear_refs").write_text("5")  # the largest resident set is counted from here
        before = process.memory_full_info()
        with watched(process) as private:
            start = time.perf_counter()
            facts = Quantizer().quantize(ModelSpec(model), settings, conversations, out)
            seconds = time.perf_counter() - start
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    kept = {key: facts[key] for key in ("linears", "bits_per_weight", "calibration_tokens") if key in facts}
    return {"seconds": seconds, "peak_bytes": peak - before.rss, "private_bytes": max(private) - before.uss, **kept}


@contextmanager
def watched(process: psutil.Process) -> Iterator[list[int]]:
    """Note the process's own bytes (USS) every 50 ms."""
    found, ended = [process.memory_full_info().uss], threading.Event()

    def look() -> None:
        while not ended.wait(0.05):
            found.append(process.memory_full_info().uss)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield found
    finally:
        ended.set()
        watcher.join()


def in_process(variant: str, model: Path, images: Path, samples: int, limit: float) -> dict:
    """Measure a variant in a fresh process; {stopped_after_seconds} if it exceeds `limit`."""
    given = [f"--only={variant}", f"--model={model}", f"--images={images}", f"--samples={samples}"]
    command = [sys.executable, "-m", "tests.benchmarks.quantizers", *given]
    try:
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=limit, check=True)
    except subprocess.TimeoutExpired:
        return {"stopped_after_seconds": limit}
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    """Parse the options, measure all variants, print a table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024, help="hidden size, a multiple of 64 (channels)")
    parser.add_argument("--layers", type=int, default=22, help="decoder layers")
    parser.add_argument("--slow_layers", type=int, default=1, help="decoder layers that the slow ones run on")
    parser.add_argument("--samples", type=int, default=32, help="calibration conversations, of which awq uses half")
    parser.add_argument("--limit", type=float, default=600, help="longest time of a variant (seconds)")
    for hidden in ("only", "model", "images"):
        parser.add_argument(f"--{hidden}", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only:
        print(json.dumps(measure(given.only, given.model, given.images, given.samples)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        write_tree(root / "images", per_class=given.samples // 8 + 1, seed=5)
        params = write_model(root / "model", given.width, given.layers)
        layer_bytes = 4 * (params - write_model(root / "fewer", given.width, given.layers - 1))
        write_model(root / "small", given.width, given.slow_layers)
        rows = {}
        for variant in VARIANTS:
            model = root / ("small" if variant in SLOW else "model")
            row = in_process(variant, model, root / "images", given.samples, given.limit)
            if variant in SLOW and "seconds" in row:
                row["extrapolated_from_layers"] = given.slow_layers
                row["seconds"] *= given.layers / given.slow_layers
                for key in ("peak_bytes", "private_bytes"):
                    row[key] += layer_bytes * (given.layers - given.slow_layers) * (variant == "awq autoawq")
            rows[variant] = row
            print(f"{variant:<14} {row}", flush=True)
    threads, cores = torch.get_num_threads(), os.cpu_count()
    facts = {"params": params, "layer_bytes_float32": layer_bytes, "threads": threads, "cores": cores}
    print(json.dumps({"benchmark": "quantizers", **vars(given), **facts, "variants": rows}))


if __name__ == "__main__":
    main()
