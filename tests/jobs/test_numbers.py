"""Numbers that jobs derive from rows, on rows made by hand."""

import pytest

from actors.baseline import ClassName, baseline_score, name_verdict, named_classes
from jobs import ablate, compress, evaluate

NESTED = [ClassName("dermatitis"), ClassName("seborrheic dermatitis"), ClassName("melanoma")]


def answer(sample: str, group: int, baseline: float, **more) -> dict:
    return {"sample_id": sample, "group": group, "baseline": baseline, **more}


def test_the_longer_of_nested_names_counts():
    assert named_classes("This is seborrheic dermatitis.", NESTED) == ["seborrheic dermatitis"]
    assert named_classes("Dermatitis, not seborrheic dermatitis.", NESTED) == ["dermatitis"]
    assert name_verdict("There is no doubt this is melanoma.", "melanoma", NESTED) == "right"


def test_a_verbatim_answer_gets_1_even_if_it_names_two():
    reference = "This melanoma can look like dermatitis."
    assert baseline_score(reference, reference, "melanoma", 1.0, NESTED) == 1
    assert baseline_score("It is melanoma or dermatitis.", reference, "melanoma", 0.9, NESTED) == 0


def test_a_limit_takes_images_of_all_classes():
    rows = [{"image": f"{label}{i}", "class": label} for label in "abc" for i in range(4)]
    assert evaluate.chosen_images(rows, 4) == ["a0", "b0", "c0", "a1"]
    assert len(evaluate.chosen_images(rows, None)) == 12


def test_differences_are_paired_by_question():
    """Two models that differ by 0.1 on every question of very different images: the difference is certain."""
    original = {str(i): answer(str(i), i // 3, (i % 7) / 7) for i in range(60)}
    better = {s: answer(s, row["group"], row["baseline"] + 0.1) for s, row in original.items()}
    del better["0"]
    found = compress._difference(original, better)
    assert found["difference_pct"] == pytest.approx(10)
    assert found["difference_interval_pct"] == pytest.approx([10, 10])


def test_metrics_by_hand():
    """Four answers on two images: one name right of two, two verbatim, one that never stopped."""
    common = {"stopped": True, "question_id": "name", "reference": "x"}
    rows = [
        {**common, "image": "1", "group": 1, "baseline": 1.0, "verdict": "right", "answer": "x"},
        {**common, "image": "1", "group": 1, "baseline": 0.5, "verdict": None, "answer": "y"},
        {**common, "image": "2", "group": 2, "baseline": 0.0, "verdict": "none", "answer": "", "stopped": False},
        {**common, "image": "2", "group": 2, "baseline": 1.0, "verdict": None, "answer": "x"},
    ]
    found = evaluate.metrics(rows)
    assert (found["images"], found["answers"], found["baseline_pct"]) == (2, 4, 62.5)
    assert (found["name_accuracy"], found["exact_pct"], found["without_stop_pct"]) == (50, 50, 25)
    assert found["name_verdicts"] == {"right": 1, "none": 1}
    assert found["baseline_interval_pct"] == [50, 75]  # the two images' own means
    assert found["name_accuracy_interval"] == pytest.approx([9.45, 90.55], abs=0.01)  # Wilson, 1 of 2


@pytest.mark.parametrize(("rule", "expected"), [("paper", [2, 3, 4]), ("all", [0, 1, 2, 3, 4, 5]), ([4, 0, 4], [0, 4])])
def test_candidate_layers_of_six(rule, expected):
    assert ablate.candidate_layers(rule, 6) == expected
