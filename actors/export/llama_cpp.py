"""llama.cpp in a process of its own, through the package xllamacpp. Imports neither torch nor transformers.

The process reads one JSON request and writes one JSON reply; its memory is that of a small interpreter and of
llama.cpp.
"""

import base64
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from actors.footprint import peak as peak_of
from actors.footprint import restart_peak, taken

PROBES = 100  # tokens whose log-probabilities are asked for
_ROOT = Path(__file__).resolve().parents[2]
_LIMIT_S = 3600


@dataclass(frozen=True)
class Files:
    """The two files of an export, and how llama.cpp runs them. context: tokens of prompt and answer."""

    model: str
    mmproj: str
    context: int
    threads: int = 1


@dataclass(frozen=True)
class Prompt:
    """One question about one image (the path of a PNG or JPEG)."""

    image: str
    question: str


def answer(files: Files, prompts: Sequence[Prompt], max_new_tokens: int) -> list[dict]:
    """Answer greedily in a fresh process.

    Returns for each prompt {prompt_tokens, ids: the answer's token ids, its end included if it has one, first: the
    log-probabilities (nats) of the PROBES most likely first tokens, by id, or None where that is half a character}.
    ValueError: llama.cpp fails, with its words.
    """
    return _ask({"do": "answer", "max_new_tokens": max_new_tokens}, files, prompts)["answers"]


def measure(files: Files, prompt: Prompt, warmup_runs: int, timed_runs: int, new_tokens: int) -> dict:
    """Return {runs: [{first_token_ms, ms_per_token, total_ms}], baseline_bytes, load_peak_bytes, steady_peak_bytes}.

    first_token_ms: from the request, image decoding and encoding included. ValueError: llama.cpp fails.
    """
    request = {"do": "measure", "warmup_runs": warmup_runs, "timed_runs": timed_runs, "new_tokens": new_tokens}
    return _ask(request, files, [prompt])


def _ask(request: dict, files: Files, prompts: Sequence[Prompt]) -> dict:
    request |= {"files": asdict(files), "prompts": [asdict(prompt) for prompt in prompts]}
    with tempfile.TemporaryDirectory() as name:
        reply = Path(name) / "reply"
        done = subprocess.run(
            [sys.executable, "-m", "actors.export.llama_cpp", str(reply)],
            input=json.dumps(request),
            cwd=_ROOT,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_LIMIT_S,
        )
        if reply.is_file():
            return json.loads(reply.read_text())
    lines = [line for line in done.stderr.splitlines() if "error" in line.lower()] or done.stderr.splitlines()[-1:]
    said = " ".join(lines[0].split())[:400] if lines else "it said nothing"
    raise ValueError(f"llama.cpp fails at {files.model!r} (exit code {done.returncode}): {said}")


class _Server:
    """llama.cpp's server in this process, with one slot."""

    def __init__(self, files: Files):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path, params.mmproj.path = files.model, files.mmproj
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = files.threads
        params.n_ctx, params.n_parallel, params.n_gpu_layers = files.context, 1, 0
        params.mmproj_use_gpu = params.warmup = False
        params.cache_ram_mib = 0  # of prompts that were answered before
        self._server = xllamacpp.Server(params)

    def chat(self, prompt: Prompt, max_tokens: int, callback=None, **options) -> dict:
        data = Path(prompt.image).read_bytes()
        kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
        url = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": prompt.question}]
        request = {"messages": [{"role": "user", "content": content}], "max_tokens": max_tokens, "temperature": 0}
        request |= {"cache_prompt": False, **options}
        reply = self._server.handle_chat_completions(request, *([callback] if callback else []))
        if isinstance(reply, dict) and "choices" not in reply:
            raise RuntimeError(f"error: {json.dumps(reply)[:400]}")
        return reply


def _answer_all(files: Files, prompts: Sequence[Prompt], request: dict) -> dict:
    server, answers = _Server(files), []
    for prompt in prompts:
        options = {"logprobs": True, "top_logprobs": PROBES, "return_tokens": True, "verbose": True}
        reply = server.chat(prompt, request["max_new_tokens"], **options)
        ids, steps = reply["__verbose"]["tokens"], reply["choices"][0]["logprobs"]["content"]
        shown = steps and ids and steps[0]["id"] == ids[0]  # a token that is part of a character has no step
        first = {step["id"]: step["logprob"] for step in steps[0]["top_logprobs"]} if shown else None
        answers.append({"prompt_tokens": reply["usage"]["prompt_tokens"], "ids": ids, "first": first})
    return {"answers": answers}


def _measure_prompt(files: Files, prompts: Sequence[Prompt], request: dict) -> dict:
    kind, count = "resident", request["new_tokens"]
    baseline = taken("cpu")[kind]
    server, runs = _Server(files), []
    load_peak = peak_of("cpu")[kind]
    restarted = restart_peak("cpu")
    for run in range(request["warmup_runs"] + request["timed_runs"]):
        ticks: list[tuple[int, float]] = []

        def note(chunk: dict, ticks=ticks) -> bool:
            if number := chunk.get("timings", {}).get("predicted_n"):
                ticks.append((number, time.perf_counter()))
            return False

        started = time.perf_counter()
        server.chat(prompts[0], count, note, stream=True, ignore_eos=True, timings_per_token=True)
        (first, begin), (last, end) = ticks[0], next(tick for tick in ticks if tick[0] == count)
        if run >= request["warmup_runs"]:
            times = {"first_token_ms": begin - started, "ms_per_token": (end - begin) / (last - first)}
            runs.append({name: 1000 * value for name, value in (times | {"total_ms": end - started}).items()})
    steady = peak_of("cpu")[kind]
    return {
        "runs": runs,
        "baseline_bytes": baseline,
        "load_peak_bytes": load_peak,
        "steady_peak_bytes": steady,
        "peak_restarted": restarted,
    }


def _main() -> None:
    request = json.loads(sys.stdin.read())
    files, prompts = Files(**request["files"]), [Prompt(**prompt) for prompt in request["prompts"]]
    reply = {"answer": _answer_all, "measure": _measure_prompt}[request["do"]](files, prompts, request)
    Path(sys.argv[1]).write_text(json.dumps(reply))


if __name__ == "__main__":
    _main()
