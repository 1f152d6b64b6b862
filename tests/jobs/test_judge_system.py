"""A configured judge whose chat template knows no system's message: its name says so, and vLLM is asked without."""

import pytest

from jobs.judging.engine import judge_identity
from tests.jobs.engines import REQUESTS, FakeVLLM, asked, completion, path, run_of  # noqa: F401 (fixtures)
from tests.judging import CHAT_ML, save_tiny_judge
from tests.templates import DROPS, REFUSES


@pytest.mark.parametrize(("template", "folds"), [(CHAT_ML, False), (REFUSES, True), (DROPS, True)])
def test_a_prompt_without_a_system_is_another_judges(run_of, tmp_path, monkeypatch, template, folds):  # noqa: F811
    model = save_tiny_judge(tmp_path / "judge")
    (tmp_path / "judge" / "chat_template.jinja").write_text(template)
    identity = judge_identity(run_of(model=model))
    assert identity.chat_template.endswith(", the system's text in the user's turn") is folds
    fake = FakeVLLM(monkeypatch, completion())
    asked(run_of(model=model, engine="vllm", gpus=1), REQUESTS[:1])
    sent, given = fake.requests[0]["messages"], REQUESTS[0]
    both = [{"role": "user", "content": f"{given.system}\n\n{given.user}"}]
    assert sent == (both if folds else given.messages)
