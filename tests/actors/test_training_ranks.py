"""Data parallel training: ranks that share each step end with the weights of a process that does all of it."""

import json
import multiprocessing
from pathlib import Path

import pytest
import torch
from torch import distributed

from actors.checkpoint.tensors import iterate_tensors
from actors.specs import ModelSpec
from actors.training.settings import SNAPSHOTS
from actors.training.trainer import Trainer
from tests.tiny import draw_conversations
from tests.training import training_settings

STEPS = 4


def train_rank(rank: int, ranks: int, source: str, lesions: Path, out: Path, options: dict) -> None:
    """Train as one rank, and write its rows to a file."""
    torch.set_num_threads(1)
    if ranks > 1:
        distributed.init_process_group("gloo", init_method=f"file://{out}.meet", rank=rank, world_size=ranks)
    settings = training_settings(**options)
    rows = list(Trainer(ModelSpec(source)).train(draw_conversations(lesions, 6), settings, str(out)))
    Path(f"{out}.{rank}").write_text(json.dumps(rows))


def train_together(ranks: int, *args) -> tuple[list[list[dict]], dict[str, torch.Tensor]]:
    """Return the rows of every rank, and the tensors of the checkpoint."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["actors.training.trainer", "tests.tiny"])
    started = [processes.Process(target=train_rank, args=(rank, ranks, *args), daemon=True) for rank in range(ranks)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
        process.kill()  # a rank whose peer failed would wait for it
    assert [process.exitcode for process in started] == [0] * ranks
    out = args[2]
    return [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(ranks)], dict(iterate_tensors(out))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch", "micro_batch"),
    [
        (6, 2),  # three micro-batches: one rank has two of them
        (4, 16),  # one micro-batch would be enough: it is cut in two
        (1, 1),  # the second rank has no conversation
    ],
)
def test_two_ranks_train_as_one_process(batch, micro_batch, tiny_path, lesions, tmp_path):
    options = {"train": ("lora", "projector"), "batch": batch, "micro_batch": micro_batch, "epochs": STEPS * batch / 6}
    ((alone,), wanted) = train_together(1, tiny_path, lesions, tmp_path / "alone", options)
    ((first, second), found) = train_together(2, tiny_path, lesions, tmp_path / "together", options)
    assert first == second and len(first) == len(alone) == STEPS
    for row, expected in zip(first, alone, strict=True):
        assert row == pytest.approx(expected, rel=1e-5)
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
    start = dict(iterate_tensors(Path(tiny_path)))
    moved = [name for name in wanted if not torch.equal(wanted[name], start[name])]
    assert moved and max(float((wanted[name] - start[name]).abs().max()) for name in moved) > 1e-3
    assert (tmp_path / "together" / SNAPSHOTS / "snapshot.safetensors").is_file()
