"""LLaVA-1.5-7B's shape in 16 and in 4 bits on a GPU: memory, latency, seconds to quantize; no hub, no Ray.

    make bench-gpu-quantized        (python -m tests.benchmarks.gpu_quantized --help)

Checkpoints with random float16 weights and 32 decoder layers less --removed: how many are left decides size and speed,
not which. Prompts have 576 image tokens and derm-tiny's words. Each checkpoint is written to disk and quantized there
by our own writers, in groups of 64: rtn, which every kernel then loads that gptqmodel has for it; awq by our search,
layer by layer on the GPU, with conversations about drawings, loaded with the kernel that transformers picks (its layout
is rtn's); nf4 by bitsandbytes. Every variant is loaded and measured by the efficiency protocol in fresh processes, in
which the variants of one depth take turns: plain `generate`, then the static cache with its captured step. What cannot
be run is a row, too, with the reason. logit error: |logits - those of 16 bits| / |those of 16 bits| of one prompt: the
kernels of one checkpoint must agree. The whole takes an hour or more; choose parts with --removed, --methods and
--kernels, and fewer runs. Needs 60 GB of disk in --folder. The last line is one JSON object.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import CLIPImageProcessor

from actors import footprint
from actors.checkpoint.loading import language_model, pick_device, quiet
from actors.derm_tiny.build import build_processor
from actors.derm_tiny.draw import write_tree
from actors.engine.replica import LlavaReplica
from actors.images import QUESTION, probe_image
from actors.maths.latency import merge_rounds
from actors.memory import GIB
from actors.probe import probe_logits
from actors.quantizers.quantizer import Quantizer
from actors.specs import ModelSpec, QuantizeSettings, Sample
from tests.benchmarks.gpu_ablation import real_model
from tests.tiny import draw_conversations, llava_7b, processor_for, tiny_model

PAPER_GB = {16: {0: 13.4, 7: 10.5, 9: 9.7}, 4: {0: 4.5, 7: 3.9, 9: 3.7}}
METHODS = ("none", "rtn", "awq", "nf4")
KERNELS = ("auto", "marlin", "machete", "exllama_v2", "gemm", "gemm_triton", "torch_awq")  # of rtn's and awq's layout
TINY_LAYERS = 12
FACTS = ("params", "layers", "weight_bytes", "baseline_bytes", "load_peak_bytes")
TIMES = ("first_token_ms", "encode_ms", "prefill_ms", "preprocess_ms", "ms_per_token", "naive_ms_per_token")
DEVICE = ("device", "threads", "torch", "transformers")


def write(folder: str, removed: int, tiny: bool) -> dict:
    """Save a random checkpoint with its processor."""
    if tiny:
        model, processor = tiny_model("clip-llama", TINY_LAYERS - removed), processor_for("clip")
    else:
        config, processor = llava_7b(), build_processor()
        side = config.vision_config.image_size
        processor.image_processor = CLIPImageProcessor(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        )
        processor.patch_size = config.vision_config.patch_size
        processor.tokenizer.model_max_length = config.text_config.max_position_embeddings
        config.image_token_index = processor.tokenizer.convert_tokens_to_ids("<image>")
        config.text_config.num_hidden_layers -= removed
        torch.manual_seed(0)
        model = real_model(config)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return {}


def quantize(source: str, out: str, method: str, dtype: str, images: str, samples: int) -> dict:
    """Quantize a checkpoint; returns the seconds, writing included, and the peaks of memory."""
    settings = QuantizeSettings(method, 4, group_size=64, clip=True, awq_search="layerwise")
    conversations = draw_conversations(Path(images), samples)
    started = time.perf_counter()
    facts = Quantizer().quantize(ModelSpec(source, dtype), settings, conversations, out)
    seconds = time.perf_counter() - started
    return {
        "quantize_s": seconds,
        "quantize_peak_bytes": {**footprint.peak(pick_device()), **footprint.peak("cpu")},
        **{key: facts[key] for key in ("linears", "bits_per_weight", "calibration_tokens") if key in facts},
    }


def measure(
    path: str, kernel: str | None, dtype: str, logits: str, decode: Sequence[str], warmup: int, runs: int, tokens: int
) -> dict:
    """Load a checkpoint and measure it with each way to decode; returns {decode: a round of the profile or why not}.

    logits: the file of the 16-bit model's, which this one writes if it is not there.
    """
    if kernel is not None:
        _choose_kernel(Path(path) / "config.json", kernel)
    replica = LlavaReplica(ModelSpec(path, dtype))
    linear = language_model(replica.model).layers[0].self_attn.q_proj
    found: dict = {"linear": type(linear).__name__}
    with tempfile.NamedTemporaryFile(suffix=".png") as image:
        probe_image().save(image.name)
        for each in decode:
            found[each] = _tried(replica.profile, Sample("probe", image.name, QUESTION), warmup, runs, tokens, each)
    said, exact = probe_logits(replica.model, replica.processor), Path(logits)
    if not exact.exists():
        np.save(exact, said)
    true = np.load(exact)
    return {**found, "logit_error": float(np.linalg.norm(said - true) / np.linalg.norm(true))}


def _choose_kernel(file: Path, kernel: str) -> None:
    config = json.loads(file.read_text())
    config["quantization_config"]["backend"] = kernel
    file.write_text(json.dumps(config, indent=2))


def _tried(task: Callable[..., dict], *given, **named) -> dict:
    """Return what a task returns, or why it did not."""
    try:
        return task(*given, **named)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return {"not_run": f"{type(error).__name__}: {lines[0][:200] if lines else 'no message'}"}


TASKS: dict[str, Callable[..., dict]] = {"write": write, "quantize": quantize, "measure": measure}


def in_process(task: str, limit: float, **given) -> dict:
    """Return what a task returns in a fresh process, or {not_run} with the reason, also if it dies or exceeds `limit`.

    This process itself takes no memory of a GPU: the driver's numbers are the tasks' own.
    """
    command = [sys.executable, "-m", "tests.benchmarks.gpu_quantized", "--task", json.dumps({"task": task, **given})]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"not_run": f"stopped after {limit:g} s"}
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or ["no message"]
        return {"not_run": f"its process ended with {done.returncode}: {last[0][:200]}"}
    return json.loads(done.stdout.splitlines()[-1])


def run(options: argparse.Namespace) -> dict:
    """Measure every variant at every depth, print them, and return all rows."""
    dtype = "float32" if options.tiny else "float16"
    rows = []
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        images = Path(scratch) / "images"
        write_tree(images, per_class=options.calibration // 8 + 1, seed=5)
        for removed in options.removed:
            folder = Path(scratch) / f"removed-{removed}"
            folder.mkdir()
            rows += at_depth(options, removed, folder, dtype, str(images))
            shutil.rmtree(folder)
    measured = next((row for row in rows if "device" in row), {})
    facts = {key: measured.get(key) for key in DEVICE}
    rows = [{key: value for key, value in row.items() if key not in DEVICE} for row in rows]
    print(table(rows))
    chosen = {key: value for key, value in vars(options).items() if key not in ("task", "folder")}
    return {"benchmark": "gpu-quantized", **facts, **chosen, "paper_gb": PAPER_GB, "variants": rows}


def at_depth(options: argparse.Namespace, removed: int, folder: Path, dtype: str, images: str) -> list[dict]:
    """Return the rows of all variants of one depth: made one after the other, measured in turns."""
    source = str(folder / "none")
    made = {"none": in_process("write", options.limit, folder=source, removed=removed, tiny=options.tiny)}
    for method in (method for method in options.methods if method != "none"):
        out = folder / method
        out.mkdir()
        given = {"source": source, "out": str(out), "method": method, "dtype": dtype, "images": images}
        made[method] = dict(made["none"]) or in_process("quantize", options.limit, **given, samples=options.calibration)
    kernels = {"rtn": options.kernels, "awq": ["auto"]}
    variants = [(method, kernel) for method in options.methods for kernel in kernels.get(method, [None])]
    rounds: dict[tuple, list[dict]] = {variant: [] for variant in variants}
    settings = {"decode": options.decode, "warmup": options.warmup, "tokens": options.tokens}
    settings |= {"runs": -(-options.runs // options.rounds), "logits": str(folder / "logits.npy"), "dtype": dtype}
    for _ in range(options.rounds):
        for method, kernel in variants:
            so_far = rounds[method, kernel]
            if "not_run" in made[method] or (so_far and "not_run" in so_far[-1]):
                continue
            given = {"path": str(folder / method), "kernel": kernel, **settings}
            so_far.append(in_process("measure", options.limit, **given))
            print(f"{_name(method, kernel, removed)}: {_said(so_far[-1], options.decode)}", flush=True)
    return [row(*variant, removed, made[variant[0]], rounds[variant], options.decode) for variant in variants]


def row(method: str, kernel: str | None, removed: int, made: dict, rounds: list[dict], decode: Sequence[str]) -> dict:
    """Return one variant's row from how it was made and from its rounds; {not_run} tells why one is missing."""
    paper = PAPER_GB[16 if method == "none" else 4].get(removed)
    found = {"method": method, "kernel": kernel, "removed": removed, "paper_gb": paper, **made}
    failed = next((each for each in rounds if "not_run" in each), None)
    if failed is not None or not rounds:
        return found | (failed or {})
    found |= {key: rounds[0][key] for key in ("linear", "logit_error")}
    for each in decode:
        missing = next((one[each] for one in rounds if "not_run" in one[each]), None)
        if missing is not None:
            found[each] = missing
            continue
        told = merge_rounds([one[each] for one in rounds])
        found |= {key: told[key] for key in (*FACTS, *DEVICE)}
        times = {name: told[name] for time in TIMES for name in (time, f"{time}_p5_p95")}
        kept = ("timed_runs", "rounds", "steady_peak_bytes", "peak_restarted")
        found[each] = {**{key: told[key] for key in kept}, **times}
    return found


def table(rows: Sequence[dict]) -> str:
    """Lay the rows out beside the paper's memory; what was not run stands below with its reason."""
    done = [row for row in rows if "weight_bytes" in row]
    kinds = list(done[0]["load_peak_bytes"]) if done else []
    lines = [["variant", "params B", "weights", "loading", *kinds, "paper GB", "first token ms", "ms/token"]]
    lines[0] += ["static ms/token", "quantized in s", "logit error"]
    for each in done:
        plain, static = (each.get(decode, {}) for decode in ("plain", "static"))
        steady = (plain if "steady_peak_bytes" in plain else static)["steady_peak_bytes"]
        sizes = [each["weight_bytes"], each["load_peak_bytes"][kinds[-1]], *(steady[kind] for kind in kinds)]
        lines.append(
            [
                _name(each["method"], each["kernel"], each["removed"]),
                f"{each['params'] / 1e9:.3f}",
                *(f"{size / GIB:.2f}" for size in sizes),
                str(each["paper_gb"] or ""),
                *(f"{times[key]:.2f}" if key in times else "" for times, key in _shown(plain, static)),
                f"{each['quantize_s']:.0f}" if "quantize_s" in each else "",
                f"{each['logit_error']:.4f}",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    text.append("Memory in GiB: loading is the peak while loading, then the peaks of plain decoding.")
    for each in rows:
        parts = {"": each, **{f", {decode}": each.get(decode, {}) for decode in ("plain", "static")}}
        name = _name(each["method"], each["kernel"], each["removed"])
        text += [f"{name}{part}: not run: {told['not_run']}" for part, told in parts.items() if "not_run" in told]
    return "\n".join(text)


def _shown(plain: dict, static: dict) -> list[tuple[dict, str]]:
    return [(plain, "first_token_ms"), (plain, "ms_per_token"), (static, "ms_per_token")]


def _name(method: str, kernel: str | None, removed: int) -> str:
    return f"{'16 bits' if method == 'none' else method}{f' {kernel}' if kernel else ''}, {removed} removed"


def _said(found: dict, decode: Sequence[str]) -> str:
    if "not_run" in found:
        return f"not run: {found['not_run']}"
    parts = [
        f"{each} {merge_rounds([found[each]])['ms_per_token']:.2f} ms/token"
        if "runs" in found[each]
        else f"{each} not run"
        for each in decode
    ]
    return f"{', '.join(parts)} ({found['linear']})"


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--removed", type=int, nargs="+", default=[0, 7, 9], help="layers fewer (default: %(default)s)")
    made.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="default: all of them")
    made.add_argument("--kernels", nargs="+", default=list(KERNELS), choices=KERNELS, help="of rtn (default: all)")
    made.add_argument("--decode", nargs="+", default=["plain", "static"], choices=["plain", "static"])
    made.add_argument("--warmup", type=int, default=10, help="unmeasured runs of a process (default: %(default)s)")
    made.add_argument("--runs", type=int, default=30, help="measured runs, over all rounds (default: %(default)s)")
    made.add_argument("--rounds", type=int, default=1, help="processes of each variant (default: %(default)s)")
    made.add_argument("--tokens", type=int, default=128, help="new tokens of a run (default: %(default)s)")
    made.add_argument("--calibration", type=int, default=32, help="awq's conversations (default: %(default)s)")
    made.add_argument("--limit", type=float, default=1800, help="longest time of a process (default: %(default)s s)")
    made.add_argument("--folder", help="where the checkpoints are written (default: the system's temporary folder)")
    made.add_argument("--tiny", action="store_true", help="tiny models in float32 on the CPU: tries the code")
    made.add_argument("--task", help=argparse.SUPPRESS)
    return made


def main() -> None:
    """Run the benchmark, or one of its tasks in this process, from the command line."""
    options = parser().parse_args()
    quiet()
    if options.task:
        given = json.loads(options.task)
        print(json.dumps(_tried(TASKS[given.pop("task")], **given)))
        return
    if not options.tiny and not torch.cuda.is_available():
        parser().error("no GPU is visible here (--tiny runs anywhere)")
    if options.tiny:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        options.kernels = ["auto"]  # a CPU has one
    print(json.dumps(run(options)))


if __name__ == "__main__":
    main()
