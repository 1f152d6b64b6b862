"""The local judge: greedy under a schema as a naive loop is, alone or beside others; what fails is a Failure."""

import asyncio
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import actors.judge.local
from actors.judge.calls import Failure, Reply, Request
from actors.judge.constrained import LABELS, Output, Task, write
from actors.judge.ladder import RUNGS, request
from actors.judge.local import judge_tokenizer
from actors.judge.prefix import SharedPrefix
from actors.judge.prompt import SYSTEM
from actors.judge.verdict import read_output
from tests.actors.local_judging import REQUESTS, ask_all, judge_of, naive
from tests.judging import save_tiny_judge


@pytest.mark.parametrize("number", [0, 2, 5, 6])
def test_the_output_is_what_a_naive_loop_writes(judge, number):
    (written,) = ask_all(judge, [REQUESTS[number]])
    ids, seen = naive(judge, REQUESTS[number])
    assert written.ids == ids
    read = read_output(written.text, RUNGS[number % 3].output)
    at = max(n for n, piece in enumerate(written.pieces) if any(sign.isdigit() for sign in piece))
    assert written.label_at == at and written.pieces[at] == str(read.model_dump()["label"])
    labels = [judge._tokenizer.convert_tokens_to_ids(label) for label in LABELS]
    assert written.probabilities == pytest.approx(seen[at].softmax(-1)[labels].tolist(), rel=1e-4)
    assert sum(written.probabilities) < 0.5  # of all tokens, not of those that the schema allows
    assert written.logprobs == pytest.approx(
        [logits.log_softmax(-1)[t].item() for t, logits in zip(ids, seen, strict=True)], abs=1e-4
    )


def test_a_batch_is_token_for_token_what_its_calls_are_one_by_one(judge):
    batched = ask_all(judge, REQUESTS)
    singly = [ask_all(judge, [each])[0] for each in REQUESTS]
    assert [written.ids for written in batched] == [written.ids for written in singly]
    assert len({len(judge._prompt(each.messages)) for each in REQUESTS}) > 5  # padding was at work
    assert len({len(written.ids) for written in batched}) > 3
    for one, other in zip(batched, singly, strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, rel=1e-3)


def test_the_rubric_is_read_once(path, monkeypatch):
    judge, read = judge_of(path), []
    reading = SharedPrefix._read
    monkeypatch.setattr(SharedPrefix, "_read", lambda self, ids: read.append(len(ids)) or reading(self, ids))
    seen = []
    handle = judge._model.register_forward_pre_hook(
        lambda module, args, given: seen.append(given["input_ids"].shape), with_kwargs=True
    )
    first = ask_all(judge, REQUESTS[:3])
    second = ask_all(judge, REQUESTS[:3])
    handle.remove()
    system, empty = (len(judge._prompt(Request(text, "", {}, 0).messages)) for text in (SYSTEM, ""))
    assert [written.ids for written in first] == [written.ids for written in second]
    assert len(read) == 1 and read[0] > system - empty and seen[0] == (1, read[0])
    longest = max(len(judge._prompt(each.messages)) for each in REQUESTS[:3])
    assert seen[1] == (3, longest - read[0])
    other = ask_all(judge, [Request("Another rubric.", each.user, each.schema, 256) for each in REQUESTS[:2]])
    mixed = ask_all(judge, [REQUESTS[0], Request("Another rubric.", REQUESTS[1].user, REQUESTS[1].schema, 256)])
    assert [written.ids for written in mixed] == [first[0].ids, other[1].ids]


def test_a_model_with_windows_reads_the_rubric_with_every_call(path, tmp_path):
    shutil.copytree(path, tmp_path / "windowed")
    config = json.loads((tmp_path / "windowed" / "config.json").read_text())
    config |= {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1}
    config["layer_types"] = ["full_attention", "sliding_attention"]
    (tmp_path / "windowed" / "config.json").write_text(json.dumps(config))
    judge = judge_of(str(tmp_path / "windowed"))
    batched = ask_all(judge, REQUESTS[:3])
    assert judge._shared._ids == []
    assert batched[2].ids == naive(judge, REQUESTS[2])[0]


def test_a_reply_is_the_text_and_the_labels_probabilities(judge):
    (written,) = ask_all(judge, REQUESTS[:1])
    assert ask_all(judge, REQUESTS[:1], "ask") == [Reply(written.text, written.probabilities)]


def test_an_output_ends_at_its_length(judge):
    wanted = request("What?", "Psoriasis.", "It is eczema. " * 4, RUNGS[1])
    (whole,) = ask_all(judge, [wanted])
    (cut,) = ask_all(judge, [Request(wanted.system, wanted.user, wanted.schema, 4)])
    assert len(whole.ids) > 4 and cut.ids == whole.ids[:4]


def test_the_prompt_is_the_templates_text_with_each_control_token_once(judge):
    wanted = REQUESTS[1]
    text = (
        f"<|im_start|>system\n{wanted.system}<|im_end|>\n<|im_start|>user\n{wanted.user}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    prompt = judge._prompt(wanted.messages)
    assert judge._tokenizer.decode(prompt) == text
    assert judge._control_tokens(prompt) == 5


def test_a_text_that_reads_as_a_control_token_is_refused(judge):
    wanted = REQUESTS[2]
    (answer,) = ask_all(judge, [Request(wanted.system, wanted.user + "<|im_end|>", wanted.schema, 24)])
    assert answer == Failure("refused", "a text in the prompt reads as one of the model's control tokens")


def test_a_call_may_fill_the_models_length_and_not_pass_it(path):
    wanted = REQUESTS[2]
    length = len(judge_of(path)._prompt(wanted.messages)) + wanted.max_tokens
    (fits,) = ask_all(judge_of(path, max_length=length), [wanted])
    (does_not,) = ask_all(judge_of(path, max_length=length - 1), [wanted])
    assert isinstance(fits, Output)
    assert does_not.kind == "refused" and f"are more than {length - 1}" in does_not.message


def test_a_schema_that_is_none_is_refused(judge):
    (answer,) = ask_all(judge, [Request("s", "u", {"type": "no such type"}, 24)])
    assert answer.kind == "refused" and "Invalid type: no such type" in answer.message


def test_calls_that_come_together_are_answered_in_batches(judge, monkeypatch):
    sizes = note_batches(monkeypatch)
    answers = ask_all(judge, [REQUESTS[2]] * 20)
    assert sizes == [8, 8, 4] and len({tuple(a.ids) for a in answers}) == 1


def test_a_call_that_was_given_up_takes_no_place(judge, monkeypatch):
    sizes = note_batches(monkeypatch)

    async def given_up():
        calls = [asyncio.create_task(judge.ask(REQUESTS[2])) for _ in range(10)]
        await asyncio.sleep(0)
        for call in calls[:6]:
            call.cancel()
        return await asyncio.gather(*calls, return_exceptions=True)

    answers = asyncio.run(given_up())
    assert sizes == [4]
    assert [type(answer) for answer in answers] == [asyncio.CancelledError] * 6 + [Reply] * 4


GPU_FULL = torch.OutOfMemoryError("CUDA out of memory")
CPU_FULL = RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory")


def note_batches(monkeypatch, most: int = 100, deadly: int | None = None, error: Exception = GPU_FULL) -> list[int]:
    """Note every batch's size; batches beyond `most`, or with a task of `deadly` tokens, run out of memory."""
    sizes = []

    def write_noting(model, grammars, tasks: list[Task], pad, shared):
        sizes.append(len(tasks))
        if len(tasks) > most or any(task.max_tokens == deadly for task in tasks):
            raise error
        return write(model, grammars, tasks, pad, shared)

    monkeypatch.setattr(actors.judge.local, "write", write_noting)
    return sizes


@pytest.mark.parametrize("error", [GPU_FULL, CPU_FULL])
def test_out_of_memory_halves_the_batch_from_then_on(path, monkeypatch, error):
    judge = judge_of(path)
    sizes = note_batches(monkeypatch, most=3, error=error)
    assert all(isinstance(answer, Output) for answer in ask_all(judge, [REQUESTS[2]] * 12))
    assert sizes == [8, 4, 2, 2, 4, 2, 2, 2, 2]


def test_a_call_that_no_memory_holds_is_refused_and_its_neighbours_are_not(path, monkeypatch):
    note_batches(monkeypatch, deadly=17)
    hungry = Request(REQUESTS[2].system, REQUESTS[2].user, REQUESTS[2].schema, 17)
    answers = ask_all(judge_of(path), [REQUESTS[2], hungry, REQUESTS[2]])
    assert [type(answer) for answer in answers] == [Output, Failure, Output]
    assert answers[1].kind == "refused" and "out of memory" in answers[1].message


def test_an_error_of_the_model_is_a_failure_and_shows_in_the_health_check(path):
    judge = judge_of(path)
    judge.check_health()
    torch.nn.init.constant_(judge._model.lm_head.weight, math.nan)
    answers = ask_all(judge, REQUESTS[:3], "ask")
    assert {answer.kind for answer in answers} == {"server_error"} and "not numbers" in answers[0].message
    with pytest.raises(RuntimeError, match="not numbers"):
        judge.check_health()


def failing(monkeypatch, poison: int, text: str):
    """Calls with an output of `poison` tokens fail, and what is beside them in a batch."""

    def write_noting(model, grammars, tasks: list[Task], pad, shared):
        if any(task.max_tokens == poison for task in tasks):
            raise RuntimeError(text)
        return write(model, grammars, tasks, pad, shared)

    monkeypatch.setattr(actors.judge.local, "write", write_noting)


def test_a_call_that_fails_does_not_take_its_neighbours_along(path, monkeypatch):
    judge, good = judge_of(path), REQUESTS[2]
    poison = Request(good.system, good.user, good.schema, 17)
    failing(monkeypatch, 17, "The judge's logits are infinite or not numbers")
    for _ in range(5):  # as the ladder asks
        answers = ask_all(judge, [good, poison, good])
        assert [type(answer) for answer in answers] == [Output, Failure, Output]
        assert answers[1].kind == "server_error" and "not numbers" in answers[1].message
        assert isinstance(ask_all(judge, [poison])[0], Failure)
    judge.check_health()


def test_a_broken_judge_leaves_the_rest_of_a_batch(path, monkeypatch):
    judge, asked = judge_of(path), []

    def fail(model, grammars, tasks, pad, shared):
        asked.append(len(tasks))
        raise RuntimeError("The judge's logits are infinite or not numbers")

    monkeypatch.setattr(actors.judge.local, "write", fail)
    answers = ask_all(judge, [Request(r.system, r.user + str(n), r.schema, 17) for n, r in enumerate(REQUESTS[:1] * 6)])
    assert asked == [6, 1, 1, 1]  # and not the three that are left
    assert {answer.kind for answer in answers} == {"server_error"} and "not numbers" in answers[-1].message


def test_a_device_that_failed_is_not_asked_again(path, monkeypatch):
    judge = judge_of(path)
    failing(monkeypatch, 24, "CUDA error: device-side assert triggered")
    assert {answer.kind for answer in ask_all(judge, [REQUESTS[2]] * 2)} == {"server_error"}
    with pytest.raises(RuntimeError, match="device-side assert"):
        judge.check_health()


def test_a_checkpoint_that_cannot_judge_is_refused(path, tmp_path):
    with pytest.raises(ValueError, match="No checkpoint at"):
        judge_tokenizer(str(tmp_path / "none"), None, False)
    broken = save_tiny_judge(tmp_path / "broken")
    weights = load_file(tmp_path / "broken" / "model.safetensors")
    gone = {name: tensor for name, tensor in weights.items() if "layers.1" not in name}
    save_file(gone, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="does not hold the model"):
        judge_of(broken)
    (tmp_path / "broken" / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template"):
        judge_of(broken)


def test_half_precision_writes_by_the_schema(path):
    (answer,) = ask_all(judge_of(path, dtype="bfloat16"), [REQUESTS[2]])
    read_output(answer.text, RUNGS[2].output)
