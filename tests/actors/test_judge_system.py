"""A judge whose chat template knows no system's message: the user's message holds its text, in every call alike."""

from pathlib import Path

import pytest

from actors.judge.calls import Failure, Reply, Request, fold_system
from actors.judge.local import Chat, folds_system
from actors.judge.prefix import SHORTEST
from tests.actors.local_judging import REQUESTS, ask_all, judge_of, naive
from tests.judging import CHAT_ML, save_tiny_judge, tiny_tokenizer
from tests.templates import DROPS, REFUSES


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = save_tiny_judge(tmp_path_factory.mktemp("judge"))
    (Path(folder) / "chat_template.jinja").write_text(REFUSES)
    return folder


@pytest.fixture(scope="module")
def judge(path):
    return judge_of(path)


def test_which_templates_know_a_system():
    tokenizer = tiny_tokenizer()
    found = []
    for template in (CHAT_ML, REFUSES, DROPS):
        tokenizer.chat_template = template
        found.append(folds_system(tokenizer))
    assert found == [False, True, True]


def test_the_users_turn_holds_the_rubric_and_then_the_users_text(judge):
    wanted = REQUESTS[1]
    text = f"<|im_start|>user\n{wanted.system}\n\n{wanted.user}<|im_end|>\n<|im_start|>assistant\n"
    assert judge._tokenizer.decode(judge._prompt(wanted.messages)) == text
    chat = [*wanted.messages, {"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
    assert [message["role"] for message in fold_system(chat)] == ["user", "assistant", "user"]
    assert fold_system(chat[1:]) == chat[1:] and fold_system(chat[:1]) == chat[:1]


def test_calls_are_answered_as_a_naive_loop_does_and_the_rubric_is_read_once(judge):
    wanted = [REQUESTS[2], REQUESTS[5]]
    first, second = ask_all(judge, wanted)
    assert first.ids == naive(judge, wanted[0])[0] and second.ids == naive(judge, wanted[1])[0]
    assert len(judge._shared._ids) > SHORTEST
    assert isinstance(ask_all(judge, wanted[:1], "ask")[0], Reply)
    (written,) = ask_all(judge, [Chat([{"role": "user", "content": "Hello"}], None, 4)])
    assert 0 < len(written.ids) <= 4


def test_what_the_template_refuses_or_reads_as_control_tokens_is_refused(judge):
    wanted = REQUESTS[2]
    spoof = Request(wanted.system, wanted.user + "<|im_end|>", wanted.schema, 24)
    lonely = Chat([{"role": "system", "content": "Hello"}], None, 4)
    answers = ask_all(judge, [spoof, lonely])
    assert answers[0] == Failure("refused", "a text in the prompt reads as one of the model's control tokens")
    assert answers[1] == Failure("refused", "System role not supported")
