"""Reading the judge's output, asking again, tallying, caching, controls: against outcomes worked out by hand."""

import asyncio
import dataclasses

import pytest

from actors.judge.cache import JudgeIdentity, may_be_cached, verdict_key
from actors.judge.calls import Failure, Reply
from actors.judge.controls import KINDS, WORTHLESS, controls, misses, unbuilt
from actors.judge.ladder import FIRST_WAIT, RUNGS, TRIES, Ask, judge, next_step
from actors.judge.prompt import Judgement, LabelOnly
from actors.judge.verdict import expected_score, read_output, tally

GOOD = Reply('{"reason": "same", "label": 3}', (0.0, 0.0, 0.1, 0.3, 0.1))
BAD = Reply("I would say 4")
SHORT = Reply('{"label": 2}')


def test_good_output():
    """Spaces around it do not matter; a label in the reason is no label."""
    assert read_output(' {"reason": "[[4]] 4/4", "label": 0}\n', Judgement).model_dump() == {
        "reason": "[[4]] 4/4",
        "label": 0,
    }
    assert read_output('{"label":4}', LabelOnly).model_dump() == {"label": 4}
    long = '{"reason": "' + "a" * 301 + '", "label": 4}'
    assert read_output(long, Judgement).model_dump()["label"] == 4  # no maxLength


@pytest.mark.parametrize(
    "text",
    [
        "",
        "4",
        "null",
        "[]",
        "Score: 4",
        '{"reason": "half an ans',
        '{"reason": "a", "label": 4}{"reason": "b", "label": 0}',
        '```json\n{"reason": "a", "label": 4}\n```',
        '{"label": 4, "reason": "a"}',
        '{"reason": "a", "label": 4, "label": 0}',
        '{"reason": "a", "label": 4, "sure": true}',
        '{"label": 4}',
        '{"reason": "a", "label": 5}',
        '{"reason": "a", "label": -1}',
        '{"reason": "a", "label": "4"}',
        '{"reason": "a", "label": 4.0}',
        '{"reason": "a", "label": true}',
        '{"reason": "a", "label": NaN}',
        '{"reason": "a", "label": null}',
        '{"reason": {"reason": "a", "label": 4}, "label": 4}',
        '{"reason": "\\ud800", "label": 4}',
        '{"reason": "a", "label": ' + "1" * 10_000 + "}",
        "[" * 100_000,
    ],
)
def test_bad_output(text):
    """Whatever is not exactly the schema is refused with a ValueError, never guessed at."""
    with pytest.raises(ValueError):
        read_output(text, Judgement)


@pytest.mark.parametrize(
    ("came", "rung"),
    [([], 0), ([BAD], 1), ([BAD, BAD], 2), ([SHORT], 1)],
)
def test_bad_output_climbs_the_ladder(came, rung):
    """First, longer, label only; without waiting."""
    assert next_step(came, 0.5) == Ask(RUNGS[rung], 0.0)


def test_rungs():
    """The second asks for more tokens in the same form, the third for the label alone."""
    first, longer, label = RUNGS
    assert (first.output, longer.output, label.output) == (Judgement, Judgement, LabelOnly)
    assert longer.max_tokens > first.max_tokens > label.max_tokens


@pytest.mark.parametrize(
    ("came", "label", "raw", "tries"),
    [
        ([GOOD], 3, 1, 1),
        ([BAD, GOOD], 3, 2, 2),
        ([BAD, BAD, SHORT], 2, 3, 3),
        ([BAD, BAD, GOOD], None, 3, 3),  # the last rung wants the label alone
        ([BAD, BAD, BAD], None, 3, 3),
        ([Failure("closed", "x"), GOOD], 3, 1, 2),
        ([Failure("denied", "HTTP 401")], None, 0, 1),
        ([BAD, Failure("refused", "HTTP 400")], None, 1, 2),
        ([Failure("rate_limit", "x", 3600.0)], None, 0, 1),
        ([Failure("timeout", "x")] * 5, None, 0, 5),
    ],
)
def test_verdicts(came, label, raw, tries):
    """When there is a verdict, its label, how many outputs it keeps and how many calls it took."""
    verdict = next_step(came, 0.5)
    assert (verdict.label, len(verdict.raw), verdict.tries) == (label, raw, tries)
    assert verdict.scored == (label is not None)
    assert verdict.scored or verdict.reason  # an unscored one says why


def test_expected_score_is_renormalised():
    """(2 x 0.1 + 3 x 0.3 + 4 x 0.1) / 0.5 = 3.0 with a mass of 0.5; nothing where nothing is offered."""
    verdict = next_step([GOOD], 0.5)
    assert (verdict.expected, verdict.label_mass) == (pytest.approx(3.0), pytest.approx(0.5))
    assert next_step([BAD, BAD, SHORT], 0.5).expected is None
    assert expected_score([0, 0, 0, 0, 0]) == (None, 0)


@pytest.mark.parametrize("kind", list(FIRST_WAIT))
def test_transport_is_tried_five_times(kind):
    """Waits double, jitter takes at most half; the fifth failure in a row is the last; Retry-After is added."""
    failure = Failure(kind, "x")
    waits = [next_step([failure] * n, 1.0).wait for n in range(1, TRIES)]
    assert waits == [FIRST_WAIT[kind] * factor for factor in (1, 2, 4, 8)]
    assert next_step([failure], 0.0).wait == FIRST_WAIT[kind] / 2
    assert next_step([Failure(kind, "x", 30.0)], 1.0).wait == 30 + FIRST_WAIT[kind]
    assert kind in next_step([failure] * TRIES, 1.0).reason


def test_each_rung_has_its_own_tries():
    """Four failures, a bad output, four failures: still asked, now on the second rung."""
    step = next_step([Failure("closed", "x")] * 4 + [BAD] + [Failure("closed", "x")] * 4, 1.0)
    assert step == Ask(RUNGS[1], FIRST_WAIT["closed"] * 8)


def test_parsing_can_be_replayed():
    """The raw outputs of a verdict, read again, give its label and reason."""
    verdict = next_step([BAD, Failure("closed", "x"), GOOD], 0.5)
    again = next_step([Reply(text) for text in verdict.raw], 0.5)
    assert (again.label, again.reason) == (verdict.label, verdict.reason) == (3, "same")


def test_loop_follows_the_ladder():
    """A rate limit, a bad output, a good one: the engine gets the rungs' lengths, the waits are slept."""
    script, asked, slept = [Failure("rate_limit", "x", 7.0), BAD, GOOD], [], []

    async def ask(request):
        asked.append(request)
        return script.pop(0)

    async def sleep(seconds):
        slept.append(seconds)

    verdict = asyncio.run(judge(ask, "What?", "Eczema.", "Eczema!", sleep))
    assert (verdict.label, verdict.tries, verdict.raw) == (3, 3, (BAD.text, GOOD.text))
    assert [request.max_tokens for request in asked] == [RUNGS[0].max_tokens, RUNGS[0].max_tokens, RUNGS[1].max_tokens]
    assert len(slept) == 1 and 9 <= slept[0] <= 11
    assert '"Eczema!"' in asked[0].messages[1]["content"]


def test_tally_by_hand():
    """4, 3, 0 of 4: 7 / 12 = 58.3 %; 1 of 50 unscored is 2 %, the most; 2 of 50 leave bounds but no headline."""
    assert tally([4, 3, 0])["judge_pct"] == pytest.approx(100 * 7 / 12)
    one = tally([3] * 49 + [None])
    assert (one["scored"], one["total"], one["judge_pct"]) == (49, 50, 75.0)
    assert one["judge_bounds_pct"] == pytest.approx([73.5, 75.5])  # (147 + 0) / 200, (147 + 4) / 200
    two = tally([3] * 48 + [None] * 2)
    assert two["judge_pct"] is None and two["judge_bounds_pct"] == pytest.approx([72.0, 76.0])
    assert tally([None])["judge_bounds_pct"] == [0.0, 100.0]
    assert tally([]) == {"scored": 0, "total": 0, "judge_pct": None, "judge_bounds_pct": None}


JUDGE = JudgeIdentity(
    "Qwen/Qwen2.5-32B-Instruct@5ede1c9", "5ede1c9", "{{ messages }}", "vllm 0.12", "bfloat16", "greedy"
)


def test_key_holds_all_that_decides(monkeypatch):
    """Any field of the judge, any text, the replicate, the rubric's version and its words change it; order matters."""
    base = verdict_key(JUDGE, "q", "r", "c", 0)
    assert base == verdict_key(JUDGE, "q", "r", "c", 0) and len(base) == 64
    others = [dataclasses.replace(JUDGE, **{field.name: "other"}) for field in dataclasses.fields(JUDGE)]
    keys = [verdict_key(other, "q", "r", "c", 0) for other in others]
    keys += [verdict_key(JUDGE, *texts, 0) for texts in ("xrc", "qxc", "qrx", "rqc", "qcr")]
    keys += [verdict_key(JUDGE, "q", "r", "c", 1), verdict_key(JUDGE, "q", "r", "c\u200b", 0)]
    with monkeypatch.context() as patch:
        patch.setattr("actors.judge.cache.RUBRIC_VERSION", "2")
        keys.append(verdict_key(JUDGE, "q", "r", "c", 0))
    monkeypatch.setattr("actors.judge.ladder.SYSTEM", "other")
    keys.append(verdict_key(JUDGE, "q", "r", "c", 0))
    assert len({base, *keys}) == len(keys) + 1


def test_only_scored_verdicts_are_cached():
    """A failure is tried again in the next run."""
    assert may_be_cached(next_step([GOOD], 0.5))
    assert not may_be_cached(next_step([BAD, BAD, BAD], 0.5))


ROWS = [
    {"question": "name?", "reference": f"This is {kind}.", "class": kind}
    for kind in ("eczema", "psoriasis", "melanoma")
    for _ in range(4)
] + [{"question": "contagious?", "reference": "No.", "class": kind} for kind in ("eczema", "psoriasis")]


def test_controls_are_built_from_the_rows():
    """One of each kind for every drawn row; another class's reference answers the same question differently."""
    built = controls(ROWS, 100, seed=3)
    kinds = [control.kind for control in built]
    assert kinds.count("reference") == 5 and kinds.count("empty") == 5  # distinct (question, reference, class)
    assert kinds.count("other_class") == 3  # "No." is right for both classes
    for control in built:
        if control.kind == "reference":
            assert control.candidate == control.reference and control.lowest == control.highest == 4
        elif control.kind == "other_class":
            assert control.candidate != control.reference and control.question == "name?"
            assert (control.lowest, control.highest) == (0, 1)
        else:
            assert control.candidate == WORTHLESS[control.kind] and control.highest == 0
    assert unbuilt(built) == []
    assert built == controls(ROWS[::-1], 100, seed=3)
    assert len({control.reference for control in controls(ROWS, 2, seed=3)}) == 2


def test_controls_without_classes():
    """Anyone's table may lack classes: then the kind that needs them is named as missing."""
    rows = [{"question": "q", "reference": "a"}, {"question": "q", "reference": "b"}]
    assert unbuilt(controls(rows, 5, seed=0)) == ["other_class"]
    assert unbuilt([]) == list(KINDS)


def test_misses():
    """A judge that is right has none; one that always says 4 misses all but the reference; UNSCORED is a miss."""
    built = controls(ROWS, 1, seed=0)
    right = [control.highest for control in built]
    assert misses(built, right) == []
    assert [miss.control.kind for miss in misses(built, [4] * len(built))] == [k for k in KINDS if k != "reference"]
    assert [miss.control.kind for miss in misses(built, [0] * len(built))] == ["reference"]
    assert len(misses(built, [None] * len(built))) == len(built)
