"""What tables of answers say of a model, and of whether it looks, on rows made by hand."""

import pytest

from jobs.config.schema import ClassConfig
from jobs.scoring import image_controls
from jobs.scoring.metrics import judge_given_name, metrics, retention, score_answers

CLASSES = ["melanoma", "psoriasis"]
KINDS = [ClassConfig(name=name) for name in CLASSES]


def row(image: str, kind: str, question: str, answer: str, **more) -> dict:
    reference = f"This is {kind}." if question == "name" else f"About {kind}."
    return {
        **{"sample_id": f"{image}#{question}", "image": image, "group": ord(image), "class": kind},
        **{"question_id": question, "question": f"{question}?", "reference": reference, "answer": answer},
        **{"token_ids": list(range(len(answer))), "tokens": len(answer), "stopped": True, **more},
    }


def answered(*answers: tuple[str, str], **more) -> list[dict]:
    """Images a and b of melanoma, c and d of psoriasis; for each the answers to name and about."""
    kinds = dict(zip("abcd", ["melanoma", "melanoma", "psoriasis", "psoriasis"], strict=True))
    rows = []
    for (image, kind), (name, about) in zip(kinds.items(), answers, strict=True):
        rows += [row(image, kind, "name", name, **more), row(image, kind, "about", about)]
    return score_answers(rows, [0.0] * len(rows), KINDS)


RIGHT = ("This is melanoma.", "About melanoma."), ("This is psoriasis.", "About psoriasis.")
ROWS = answered(RIGHT[0], ("psoriasis", "About"), RIGHT[1], ("I cannot tell.", "About psoriasis."))


def test_metrics_by_hand():
    found = metrics(ROWS, CLASSES)
    assert (found["images"], found["answers"]) == (4, 8)
    # b's "About" lacks the name that its reference has
    assert found["baseline_pct"] == found["exact_pct"] == pytest.approx(100 * 5 / 8)
    assert found["baseline_interval_pct"][0] < 50 < 75 < found["baseline_interval_pct"][1]
    assert found["name_accuracy"] == 50
    assert found["name_accuracy_interval"] == pytest.approx([15.00, 85.00], abs=0.01)  # Wilson, 2 of 4
    assert found["name_verdicts"] == {"right": 2, "wrong": 1, "refused": 1}
    assert found["confusion"]["classes"] == CLASSES and found["confusion"]["unnamed"] == ["none", "multiple", "refused"]
    assert found["confusion"]["counts"] == [[1, 1, 0, 0, 0], [0, 1, 0, 0, 1]]
    assert found["macro_f1_pct"] == pytest.approx(100 * (2 / 3 + 2 / 4) / 2)
    assert found["macro_f1_interval_pct"][0] < found["macro_f1_pct"] < found["macro_f1_interval_pct"][1]


def test_the_other_questions_given_the_name():
    """Named rightly: a and c, both told about in the reference's words; not: b without its name, d in the words."""
    found = metrics(ROWS, CLASSES)["given_name"]
    assert found["right"]["images"] == found["right"]["answers"] == 2 and found["right"]["exact_pct"] == 100
    assert found["not_right"]["answers"] == 2 and found["not_right"]["baseline_pct"] == 50
    everything = metrics(answered(RIGHT[0], RIGHT[0], RIGHT[1], RIGHT[1]), CLASSES)["given_name"]
    assert everything["not_right"] == {
        **{"images": 0, "answers": 0, "baseline_pct": None, "baseline_interval_pct": None},
        **{"exact_pct": None, "exact_interval_pct": None},
    }


def test_the_judges_score_of_the_other_questions_given_the_name():
    told = {row["sample_id"]: n % 5 for n, row in enumerate(ROWS)}
    rightly = {row["image"] for row in ROWS if row["verdict"] == "right"}
    found = judge_given_name(ROWS, told)
    for part, named in (("right", True), ("not_right", False)):
        others = [row for row in ROWS if row["verdict"] is None and (row["image"] in rightly) == named]
        own = [told[row["sample_id"]] for row in others]
        assert found[part]["judge_pct"] == pytest.approx(100 * sum(own) / len(own) / 4) and found[part]["images"] == 2
    unscored = judge_given_name(ROWS, dict.fromkeys(told))
    assert unscored["right"] == {"images": 0, "judge_pct": None, "judge_interval_pct": None}
    assert judge_given_name(ROWS, {}) is None


def test_loops_and_answers_that_never_end():
    rows = answered(*[("x", "y")] * 4, token_ids=[5, *[1, 2] * 4], tokens=9, stopped=False)
    assert {one["loop_tokens"] for one in rows} == {0, 8}
    found = metrics(rows, CLASSES)
    assert found["loop_pct"] == found["without_stop_pct"] == 50
    assert 0 < found["loop_interval_pct"][0] < 50
    # a stop token behind a loop is no part of it
    assert score_answers([{**rows[0], "token_ids": [*[1] * 7, 1], "tokens": 7}], [0.0], KINDS)[0]["loop_tokens"] == 0


def test_nothing_was_asked_for_the_name():
    found = metrics([one for one in ROWS if one["question_id"] == "about"], CLASSES)
    assert found["name_accuracy"] is found["macro_f1_pct"] is found["confusion"] is None
    assert found["given_name"]["right"]["answers"] == found["given_name"]["not_right"]["answers"] == 0


def test_retention_is_of_shared_questions_and_paired():
    original = answered(RIGHT[0], RIGHT[0], RIGHT[1], RIGHT[1])
    assert retention(original, original, CLASSES)["baseline"] == {"pct": 100, "interval_pct": [100, 100]}
    found = retention(original, ROWS, CLASSES)
    assert found["baseline"]["pct"] == found["exact"]["pct"] == pytest.approx(100 * 5 / 8)
    assert found["name_accuracy"]["pct"] == 50 and found["stopped"]["pct"] == 100
    assert found["macro_f1"]["pct"] == pytest.approx(100 * (2 / 3 + 2 / 4) / 2)
    assert found["macro_f1"]["interval_pct"][0] < 50 < found["macro_f1"]["interval_pct"][1]
    assert retention(original, ROWS[:2], CLASSES)["name_accuracy"]["pct"] == 100
    # of an original that never was right nothing can be retained
    assert retention(ROWS[2:4], original[2:4], CLASSES)["exact"] == {"pct": None, "interval_pct": None}


def test_another_images_answers_are_those_of_the_same_question():
    swapped = image_controls.swapped_rows(ROWS, seed=0)
    assert len(swapped) == len(ROWS)
    given = {one["sample_id"]: one for one in ROWS}
    kinds = {one["image"]: one["class"] for one in ROWS}
    for one in swapped:
        assert kinds[one["shown"]] != one["class"] and one["control"] == "swapped"
        assert one["answer"] == given[f"{one['shown']}#{one['question_id']}"]["answer"]
        assert one["reference"] == given[one["sample_id"]]["reference"]
    assert len({(one["image"], one["shown"]) for one in swapped}) == 4  # one image for both questions
    assert swapped == image_controls.swapped_rows(ROWS, seed=0)
    assert image_controls.swapped_rows([one for one in ROWS if one["class"] == "melanoma"], seed=0) == []
    assert len(image_controls.swapped_rows([*ROWS[:2], ROWS[4]], seed=0)) == 2  # nothing told about c


def controlled(rows: list[dict], blank: dict[str, str]) -> dict:
    answers = {q: {"answer": a, "token_ids": [1], "tokens": 1, "stopped": True} for q, a in blank.items()}
    made = [*image_controls.blank_rows(rows, answers), *image_controls.swapped_rows(rows, seed=0)]
    return image_controls.summary(rows, score_answers(made, [0.0] * len(made), KINDS))


def test_a_model_that_looks_falls():
    rows = answered(RIGHT[0], RIGHT[0], RIGHT[1], RIGHT[1])
    found = controlled(rows, {"name?": "This is melanoma.", "about?": "About melanoma."})
    assert found["blank"]["name_accuracy"] == found["blank"]["name_fall_pct"] == 50
    assert found["blank"]["same_answer_pct"] == 50
    assert found["swapped"]["name_accuracy"] == found["swapped"]["baseline_pct"] == 0
    assert found["swapped"]["name_fall_pct"] == found["swapped"]["baseline_fall_pct"] == 100
    assert found["swapped"]["baseline_fall_interval_pct"] == [100, 100]


def test_a_model_that_does_not_look_loses_nothing():
    rows = answered(*[RIGHT[0]] * 4)
    found = controlled(rows, {"name?": "This is melanoma.", "about?": "About melanoma."})
    for kind in ("blank", "swapped"):
        assert found[kind]["baseline_fall_pct"] == found[kind]["name_fall_pct"] == 0
        assert found[kind]["same_answer_pct"] == 100


def test_the_blank_image_is_asked_about_once_for_each_question():
    samples = image_controls.blank_samples(ROWS, "blank.png")
    assert [(one.id, one.image) for one in samples] == [("about?", "blank.png"), ("name?", "blank.png")]
    found = controlled([one for one in ROWS if one["class"] == "melanoma"], {"name?": "x"})
    assert found["blank"]["answers"] == 2 and found["swapped"] is None
