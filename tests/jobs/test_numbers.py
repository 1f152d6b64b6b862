"""Numbers that jobs derive from rows, on rows made by hand."""

import numpy as np
import pytest

from actors.baseline import ClassName, baseline_score, name_verdict, named_classes
from actors.maths.losses import Losses
from jobs import ablate, evaluate
from jobs.config.schema import AblateConfig
from jobs.scoring.differences import differences

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
    assert evaluate.choose_images(rows, 4) == ["a0", "b0", "c0", "a1"]
    assert len(evaluate.choose_images(rows, None)) == 12


def test_differences_are_paired_by_question():
    """Two models that differ by 0.1 on every question of very different images: the difference is certain."""
    original = {str(i): answer(str(i), i // 3, (i % 7) / 7) for i in range(60)}
    better = {s: answer(s, row["group"], row["baseline"] + 0.1) for s, row in original.items()}
    del better["0"]
    models = [{s: row["baseline"] for s, row in one.items()} for one in (original, better)]
    found = differences(models, {s: row["group"] for s, row in original.items()}, 1.0)[1]
    assert found["difference_pct"] == pytest.approx(10)
    assert found["difference_interval_pct"] == pytest.approx([10, 10])


@pytest.mark.parametrize(
    ("rule", "expected"),
    [("paper", [2, 3, 4, 5, 6]), ("all", list(range(8))), ([4, 0, 4], [0, 4]), ("outliers", [0, 2, 3, 4, 5, 6])],
)
def test_candidate_layers_of_eight(rule, expected):
    found = ablate.candidate_layers(AblateConfig(candidates=rule), 8, [1, 7] if rule == "outliers" else [])
    assert found == expected


def test_the_plus_keeps_the_first_four_and_the_last_two_blocks():
    assert ablate.candidate_layers(AblateConfig(candidates="all", criterion="taylor+"), 10, []) == [4, 5, 6, 7]
    assert ablate.candidate_layers(AblateConfig(candidates=[1], criterion="taylor+"), 10, []) == [1]


def losses(values) -> Losses:
    values = np.array(values, dtype=float)
    return Losses(values, np.ones_like(values), np.arange(len(values)))


def test_layers_are_ranked_by_what_is_lost_and_only_sure_differences_are_called_apart():
    """Three layers on 40 images: 5 costs nothing, 2 a little, always; 7 the same as 2 on average, at random."""
    noise = np.random.default_rng(0).normal(0, 0.5, 40)
    found = losses(np.stack([np.full(40, 0.2), np.zeros(40), 0.21 + noise - noise.mean()], axis=1))
    rows = {row["layer"]: row for row in ablate.score_rows("answer_similarity", [2, 5, 7], found)}
    assert [rows[layer]["rank"] for layer in (5, 2, 7)] == [1, 2, 3]
    assert [rows[2][key] for key in ("score", "low", "high")] == pytest.approx([0.8] * 3)
    assert rows[7]["low"] < rows[7]["score"] < rows[7]["high"]
    assert rows[7]["score"] == pytest.approx(0.79)
    assert rows[5]["apart_from_next"] and not rows[2]["apart_from_next"]
    ranks = {layer: (row["rank_low"], row["rank_high"]) for layer, row in rows.items()}
    assert ranks == {5: (1, 1), 2: (2, 3), 7: (2, 3)}


def test_losses_are_weighted_by_tokens():
    """Two answers of 1 and 3 tokens that lose 4 and 0 nats a token: 1 nat a token, a perplexity of e."""
    found = Losses(np.array([[4.0], [0.0]]), np.array([[1.0], [3.0]]), np.array([0, 1]))
    (row,) = ablate.score_rows("perplexity", [0], found)
    assert row["score"] == pytest.approx(np.e)


def test_layers_that_lose_the_same_share_their_ranks():
    """All but layer 4 cost nothing, always: each may be the first, the second or the third to go."""
    found = losses(np.tile([0.0, 0.0, 0.3, 0.0], (12, 1)))
    rows = {row["layer"]: row for row in ablate.score_rows("answer_similarity", [1, 3, 4, 6], found)}
    assert [rows[layer]["rank"] for layer in (1, 3, 6, 4)] == [1, 2, 3, 4]
    ranks = {layer: (row["rank_low"], row["rank_high"]) for layer, row in rows.items()}
    assert ranks == {1: (1, 3), 3: (1, 3), 6: (1, 3), 4: (4, 4)}
    assert [rows[layer]["apart_from_next"] for layer in (1, 3, 6, 4)] == [False, False, True, False]


def test_a_loss_that_is_no_number_goes_last():
    found = losses(np.tile([np.nan, 2.0, 1.0], (4, 1)))
    rows = ablate.score_rows("kl", [0, 1, 2], found)
    assert [(row["rank"], row["rank_low"], row["rank_high"]) for row in rows] == [(3, 3, 3), (2, 2, 2), (1, 1, 1)]


def test_criteria_agree_by_kendalls_tau():
    """Every two of them, either way; undefined where one loses the same by all layers."""
    scores = []
    for criterion, each in {"answer_similarity": [1.0, 2.0, 3.0], "kl": [0.0, 0.0, 5.0], "random": [0.0] * 3}.items():
        scores += ablate.score_rows(criterion, [0, 1, 2], losses(np.tile(each, (3, 1))))
    tau = {(row["criterion"], row["other"]): row["tau"] for row in ablate.agreement_rows(scores)}
    assert tau["answer_similarity", "kl"] == tau["kl", "answer_similarity"] == pytest.approx(2 / 6**0.5)
    assert tau["answer_similarity", "random"] is tau["random", "random"] is None
    assert [ablate.format_tau(tau[one]) for one in (("kl", "kl"), ("kl", "random"))] == ["+1.00", "undefined"]
