"""What derm-smol is asked about the drawn lesions, and answers: English sentences, with more than one right wording.

Nothing here is medical advice: the images are drawings.
"""

from collections.abc import Callable

import numpy as np

from actors.derm_tiny.world import CLASSES, POSITIONS, SIZES, TONES, Lesion

QUESTIONS = {
    "name": "Which disease does this picture show, and how can you tell?",
    "cause": "What causes this disease, and what should be done about it?",
    "report": "Write a short report about the lesion in this picture.",
}

# For every class of derm-tiny: two ways to say where it comes from, and what is done about it.
_CAUSES = {
    "rosacea": (
        "Rosacea comes from reactive blood vessels in the face that stay wide for too long",
        "The cause of rosacea is a long inflammation around the small blood vessels of the face",
        "a doctor can treat it with creams, and heat, alcohol and spicy food should be avoided",
    ),
    "actinic keratosis": (
        "Actinic keratosis comes from many years of sunlight on unprotected skin",
        "The cause of actinic keratosis is damage that ultraviolet light has done to the upper skin",
        "it should be removed by freezing or a cream, because it can turn into cancer",
    ),
    "basal cell carcinoma": (
        "Basal cell carcinoma grows from cells of the basal layer that ultraviolet light has changed",
        "The cause of basal cell carcinoma is sunlight that has damaged the deepest cells of the upper skin",
        "it grows slowly and rarely spreads, but it should be cut out by a surgeon",
    ),
    "dermatitis": (
        "Dermatitis is caused by an allergy or by something that irritates the skin",
        "The cause of dermatitis is an immune system that answers too strongly to a harmless substance",
        "the trigger should be found and avoided, and a cream calms the itching",
    ),
    "melanoma": (
        "Melanoma grows from pigment cells whose genes were damaged, often by sunburn",
        "The cause of melanoma is damage to the pigment cells, for which sunburn in childhood is a risk",
        "it spreads early, so that it has to be cut out at once and checked by a specialist",
    ),
    "psoriasis": (
        "Psoriasis is caused by an immune system that makes skin cells grow much too fast",
        "The cause of psoriasis is an inherited fault of the immune system that drives the growth of the skin",
        "it cannot be cured, but light, creams and modern drugs keep it quiet",
    ),
    "lichen planus": (
        "Lichen planus is an immune reaction against the cells of the lower skin",
        "The cause of lichen planus is not known for certain, but immune cells attack the skin",
        "it often goes away by itself, and cortisone helps against the itching",
    ),
    "seborrheic keratosis": (
        "Seborrheic keratosis appears with age and runs in families",
        "The cause of seborrheic keratosis is a harmless growth of old skin cells",
        "it is benign, and it can stay where it is unless it disturbs",
    ),
}
_NAMES: tuple[Callable[[str, str], str], ...] = (
    lambda name, look: f"This picture shows {name}. One can tell by the {look}, which is typical of it.",
    lambda name, look: f"The disease is {name}, because there is a {look}, as one expects to see in this condition.",
    lambda name, look: (
        f"I think that this is {name}. The skin has a {look} here, and few other diseases look like that."
    ),
)
_REPORT: tuple[Callable[[str, str, str, str, str], str], ...] = (
    lambda size, look, place, tone, hairs: (
        f"There is a {size} {look} in the {place} of the picture. "
        f"The skin around it is {tone}, and the lesion is {hairs} hairs."
    ),
    lambda size, look, place, tone, hairs: (
        f"On {tone} skin one sees a {size} {look}. It lies in the {place} of the image and is {hairs} hairs."
    ),
)
WORDINGS = {"name": len(_NAMES), "cause": 2, "report": len(_REPORT)}


def answer(lesion: Lesion, question_id: str, wording: int) -> str:
    """Return one of the WORDINGS[question_id] right answers to a question; KeyError for another question."""
    kind = CLASSES[lesion.label]
    if question_id == "name":
        return _NAMES[wording](kind.name, kind.look)
    if question_id == "cause":
        *causes, advice = _CAUSES[kind.name]
        return f"{causes[wording]}; {advice}."
    if question_id == "report":
        hairs = "crossed by" if lesion.hairs else "free of"
        return _REPORT[wording](SIZES[lesion.size], kind.look, POSITIONS[lesion.position], TONES[lesion.tone], hairs)
    raise KeyError(question_id)


def any_answer(lesion: Lesion, question_id: str, rng: np.random.Generator) -> str:
    """Return one of the right answers, each as likely as the others."""
    return answer(lesion, question_id, int(rng.integers(WORDINGS[question_id])))
