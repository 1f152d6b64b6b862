"""The embedded baseline's score: which classes an answer affirms, token F1, and the gate on the name."""

import pytest

from actors.baseline import ClassName, baseline_score, name_given, name_verdict, named_classes, token_f1, words

CLASSES = (
    ClassName("actinic keratosis", ("solar keratosis",)),
    ClassName("basal cell carcinoma", ("BCC",)),
    ClassName("dermatitis", ("eczema",)),
    ClassName("melanoma"),
    ClassName("psoriasis"),
    ClassName("seborrheic keratosis"),
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("This is psoriasis.", ["psoriasis"]),
        ("PSORIASIS", ["psoriasis"]),
        ("It looks like a solar keratosis", ["actinic keratosis"]),
        ("multiple actinic keratoses", ["actinic keratosis"]),
        ("Seborrheic\n keratoses", ["seborrheic keratosis"]),
        ("a basal-cell carcinoma", ["basal cell carcinoma"]),
        ("several basal cell carcinomas", ["basal cell carcinoma"]),
        ("two melanomas", ["melanoma"]),
        ("likely bcc", ["basal cell carcinoma"]),
        ("This is not melanoma.", []),
        ("no sign of melanoma", []),
        ("psoriasis rather than eczema", ["psoriasis"]),
        ("It isn't psoriasis, it is melanoma", ["melanoma"]),
        ("Not psoriasis. Melanoma.", ["melanoma"]),
        ("not melanoma; psoriasis, and not eczema", ["psoriasis"]),
        ("melanoma, not to be taken for a nevus", ["melanoma"]),
        ("This rules out psoriasis", []),
        ("neither psoriasis nor dermatitis", []),
        ("This isn\u2019t melanoma", []),
        ("It doesn't look like melanoma", []),
        ("This cannot be melanoma", []),
        ("It can\u2019t be melanoma", []),
        ("unlikely to be melanoma", []),
        ("This was never psoriasis", []),
        ("Melanoma is very unlikely", []),
        ("Psoriasis can be excluded, this is eczema", ["dermatitis"]),
        ("a non-melanoma skin cancer", []),
        ("not psoriasis but melanoma", ["melanoma"]),
        ("It is melanoma but not psoriasis", ["melanoma"]),
        ("not only melanoma but also psoriasis", ["melanoma", "psoriasis"]),
        ("I cannot see it well: melanoma", ["melanoma"]),
        ("I cannot be wrong \u2013 melanoma", ["melanoma"]),
        ("Psoriasis is unlikely to spread", ["psoriasis"]),
        ("Psoriasis is not contagious", ["psoriasis"]),
        ("non-healing basal cell carcinoma", ["basal cell carcinoma"]),
        ("there is no doubt that this is melanoma", ["melanoma"]),
        ("melanoma or psoriasis", ["melanoma", "psoriasis"]),
        ("psoriasis or melanoma", ["melanoma", "psoriasis"]),
        ("keratosis", []),
        ("melanomatous psoriasiform neurodermatitis", []),
        ("", []),
    ],
)
def test_named_classes(text, expected):
    """Synonyms, plurals, line breaks, hyphens and negations, in the order of the classes."""
    assert named_classes(text, CLASSES) == expected


def test_plural_class_names():
    """A class given in the plural, as a folder's name may be, finds the singular too."""
    kinds = (ClassName("Seborrheic Keratoses"), ClassName("Melanomas"))
    assert named_classes("a seborrheic keratosis", kinds) == ["Seborrheic Keratoses"]
    assert named_classes("a melanoma", kinds) == ["Melanomas"]


def test_words():
    """Lower case, without punctuation."""
    assert words("It's PSORIASIS, type-2!") == ["it", "s", "psoriasis", "type", "2"]


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("this is psoriasis", "This is psoriasis.", 1.0),
        ("this is melanoma", "This is psoriasis.", 2 / 3),  # 2 of 3 words both ways
        ("red red spot", "red spot on skin", 4 / 7),  # 2 common; precision 2/3, recall 2/4
        ("nothing", "red spot", 0.0),
        ("", "red spot", 0.0),
        ("red", "", 0.0),
    ],
)
def test_token_f1(answer, reference, expected):
    """By hand: 2 P R / (P + R) over multisets of words."""
    assert token_f1(answer, reference) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("This is melanoma.", "right"),
        ("This is psoriasis.", "wrong"),
        ("A dark spot.", "none"),
        ("", "none"),
        ("I cannot tell.", "refused"),
        ("I\u2019m sorry, but I can\u2019t help\n with that.", "refused"),
        ("As an AI, I am not able  to diagnose.", "refused"),
        ("It is not melanoma; I'm not sure what it is.", "refused"),
        ("I am sorry to say that this is melanoma.", "right"),  # a name beside it: no refusal
        ("Sorry, melanoma or psoriasis", "multiple"),
        ("A cannoted sorrylike spot", "none"),
        ("melanoma or psoriasis", "multiple"),
        ("not melanoma", "none"),
    ],
)
def test_name_verdict(answer, verdict):
    """The truth is melanoma."""
    assert name_verdict(answer, "melanoma", CLASSES) == verdict


def test_name_given():
    """Which class it was, under the name of the class, whatever its spelling."""
    assert name_given("likely BCC", CLASSES) == ("basal cell carcinoma", "one")
    assert name_given("melanoma or eczema", CLASSES) == (None, "multiple")
    assert name_given("I cannot say.", CLASSES) == (None, "refused")
    assert name_given("a spot", CLASSES) == (None, "none")


@pytest.mark.parametrize(
    ("answer", "reference", "similarity", "expected"),
    [
        ("This is melanoma.", "This is melanoma.", 1.0, 1.0),
        ("It is melanoma", "This is melanoma.", 0.8, (2 / 3 + 0.8) / 2),
        ("This is psoriasis.", "This is melanoma.", 0.9, 0.0),  # the wrong name
        ("This is", "This is melanoma.", 0.9, 0.0),  # no name
        ("melanoma or psoriasis", "This is melanoma.", 0.9, 0.0),  # both
        ("A dark spot", "A dark stain", 0.5, (2 / 3 + 0.5) / 2),  # the reference names nothing: no gate
        ("A dark spot of melanoma", "A dark stain", 0.5, (4 / 8 + 0.5) / 2),  # 2 of 5 and of 3 words: F1 = 1/2
        ("A dark spot of psoriasis", "A dark stain", 0.5, 0.0),  # but a wrong name costs everything
        ("wholly else", "A dark stain", -0.3, 0.0),  # a negative similarity counts as 0
    ],
)
def test_baseline_score(answer, reference, similarity, expected):
    """By hand, the truth being melanoma."""
    assert baseline_score(answer, reference, "melanoma", similarity, CLASSES) == pytest.approx(expected)
