"""The cap: one model that fits in it and one that does not, in real processes; every verdict, feigned."""

import json

import pytest
import torch

import actors.capped
from actors.capped import Capped
from actors.memory import GIB, TooLittleMemory
from actors.specs import ModelSpec

MIB = 2**20


@pytest.mark.slow
def test_a_cap_that_one_model_fits_in_and_a_larger_one_does_not(tiny_path, wide_path, probe):
    fits = Capped().answers(ModelSpec(tiny_path, gpus=0), [probe, probe], 4, 4 * GIB)
    assert fits["fits"] and fits["answers"] == 2 and fits["stage"] == "done"
    assert 100 * MIB < fits["baseline_bytes"] < fits["peak_bytes"] < 2 * GIB
    cap = fits["peak_bytes"] + 60 * MIB
    not_fit = Capped().answers(ModelSpec(wide_path, gpus=0), [probe], 4, cap)
    assert not not_fit["fits"] and not_fit["answers"] == 0 and not_fit["stage"] == "loading"
    assert not_fit["cap_bytes"] == cap < not_fit["peak_bytes"] < cap + 300 * MIB


def test_a_cap_that_not_even_the_libraries_fit_in(tiny_path, probe):
    outcome = Capped().answers(ModelSpec(tiny_path, gpus=0), [probe], 4, 40 * MIB)
    assert (outcome["fits"], outcome["stage"], outcome["baseline_bytes"]) == (False, "starting", None)


def judge_process(monkeypatch, resident: int, code: int, *notes: dict, gpus: float = 0) -> dict:
    """Return `Capped`'s answer for a process with these peak bytes, exit code and notes, under a cap of 1 GiB."""

    def watched(folder, cap_bytes):
        assert cap_bytes == (None if gpus else GIB)
        (folder / "stderr").write_text("first\nlast words\n")
        (folder / "notes").write_text("".join(json.dumps(note) + "\n" for note in notes) + '{"half')
        return resident, code

    monkeypatch.setattr(actors.capped, "_run_watched", watched)
    return Capped().answers(ModelSpec("m", gpus=gpus), [], 4, GIB)


LOADING, DONE = {"stage": "loading", "baseline_bytes": 5}, {"stage": "done", "answers": 3}


def test_verdicts_on_a_cpu(monkeypatch):
    assert judge_process(monkeypatch, GIB, 0, LOADING, DONE, {"peak_bytes": GIB})["fits"]
    late = judge_process(monkeypatch, GIB - 5, 0, LOADING, DONE, {"peak_bytes": GIB + 1})
    assert not late["fits"] and late["peak_bytes"] == GIB + 1, "a peak between two looks counts"
    assert not judge_process(monkeypatch, GIB + 1, -9, LOADING)["fits"]
    with pytest.raises(RuntimeError, match=r"exit code -9 at 0\.50 GiB .* \(last words\)"):
        judge_process(monkeypatch, GIB // 2, -9, LOADING)
    with pytest.raises(ValueError, match="no such checkpoint"):
        judge_process(monkeypatch, 5, 0, LOADING, {"error": "no such checkpoint"}, {"peak_bytes": 7})


def test_verdicts_on_a_gpu(monkeypatch):
    """Main memory is not capped there; out of memory ends early; what the driver gave counts at the end."""
    assert judge_process(monkeypatch, 3 * GIB, 0, LOADING, DONE, {"peak_bytes": GIB}, gpus=1)["fits"]
    out = judge_process(monkeypatch, 3 * GIB, 0, LOADING, {"peak_bytes": GIB - 9}, gpus=1)
    assert (out["fits"], out["peak_bytes"], out["stage"]) == (False, GIB - 9, "loading")
    assert not judge_process(monkeypatch, 5, 0, LOADING, DONE, {"peak_bytes": GIB + 1}, gpus=1)["fits"]
    with pytest.raises(RuntimeError, match="Cannot tell whether"):
        judge_process(monkeypatch, 3 * GIB, -9, LOADING, gpus=1)


def test_the_process_tells_out_of_memory_from_faults(tmp_path, monkeypatch):
    """What the process notes when its work ends with one exception or another."""

    def ended_with(error: Exception, gpus: float) -> dict:
        folder = tmp_path / f"{type(error).__name__}-{gpus}"
        folder.mkdir()
        (folder / "request").write_text(json.dumps({"spec": {"path": "m", "gpus": gpus}}))

        def answer_all(*_):
            raise error

        monkeypatch.setattr(actors.capped, "_answer_all", answer_all)
        monkeypatch.setattr(actors.capped, "peak", lambda device: {"resident": 8, "driver": 9})
        actors.capped._try(folder)
        return actors.capped._read_notes(folder)

    assert ended_with(torch.OutOfMemoryError("CUDA out of memory"), 1)["peak_bytes"] == 9
    assert "error" not in ended_with(TooLittleMemory("needs more"), 1)
    assert ended_with(TooLittleMemory("needs more"), 0)["error"] == "needs more"
    assert ended_with(ValueError("broken"), 1)["error"] == "broken"
    with pytest.raises(RuntimeError, match="a fault"):
        ended_with(RuntimeError("a fault"), 1)


def test_a_gpus_share_leaves_room_for_the_context(monkeypatch):
    """10 GiB, of which the context has 1: under a cap of 6 the allocator gets 5; a cap of 11 is refused."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (9 * GIB, 10 * GIB))
    monkeypatch.setattr(actors.capped, "context_bytes", lambda: GIB)
    assert actors.capped._share(6 * GIB) == pytest.approx(0.5)
    assert 0 < actors.capped._share(GIB // 2) < 1e-9
    with pytest.raises(ValueError, match=r"profile\.cap_gib is 11, but the GPU has 10\.0 GiB"):
        actors.capped._share(11 * GIB)
