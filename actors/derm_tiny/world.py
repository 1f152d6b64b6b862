"""The words of derm-tiny: eight classes, four attributes drawn independently of the class, three questions.

The class fixes how a lesion looks and what is said about it; skin tone, position, size and hairs
do not depend on it, so the description of a lesion cannot be known without looking at the image.
Nothing here is medical advice: the images are drawings.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class DermClass:
    """One disease: the folder its images live in, the sentence about it, and how its lesion looks."""

    name: str
    folder: str
    about: str
    look: str


CLASSES = (
    DermClass(
        "rosacea",
        "Rosacea",
        "Rosacea is a chronic redness of the face with small bumps, linked to reactive blood vessels.",
        "red patch with small bumps",
    ),
    DermClass(
        "actinic keratosis",
        "Actinic Keratosis",
        "Actinic keratosis is a rough precancerous spot caused by long exposure to the sun.",
        "rough pink spot with yellow crust",
    ),
    DermClass(
        "basal cell carcinoma",
        "Basal Cell Carcinoma",
        "Basal cell carcinoma is a slow skin cancer of the basal layer caused by ultraviolet light.",
        "pearly nodule with a dark centre",
    ),
    DermClass(
        "dermatitis",
        "Dermatitis",
        "Dermatitis is an itchy inflammation of the skin triggered by allergy or irritation.",
        "blurred red area with scratch marks",
    ),
    DermClass(
        "melanoma",
        "Melanoma",
        "Melanoma is a dangerous cancer of the pigment cells, often caused by sunburn.",
        "irregular black stain of several colours",
    ),
    DermClass(
        "psoriasis",
        "Psoriasis",
        "Psoriasis is an immune disease in which skin cells grow too fast and form plaques.",
        "sharp red plaque with silver scales",
    ),
    DermClass(
        "lichen planus",
        "Lichen Planus",
        "Lichen planus is an immune reaction that forms flat itchy violet papules.",
        "group of flat violet papules",
    ),
    DermClass(
        "seborrheic keratosis",
        "Seborrheic Keratoses",
        "Seborrheic keratosis is a harmless waxy growth that appears with age.",
        "waxy brown growth with dark dots",
    ),
)

TONES = ("light", "medium", "dark")
POSITIONS = ("upper left", "upper right", "centre", "lower left", "lower right")
SIZES = ("small", "medium", "large")

QUESTIONS = {
    "name": "What is the name of this disease?",
    "about": "What is this disease and what causes it?",
    "describe": "Describe the lesion.",
}


@dataclass(frozen=True)
class Lesion:
    """What one image shows: indices into CLASSES, TONES, POSITIONS and SIZES, and whether hairs cross it."""

    label: int
    tone: int
    position: int
    size: int
    hairs: bool


def answer(lesion: Lesion, question_id: str) -> str:
    """Return the reference answer to a question of QUESTIONS; KeyError for any other question id."""
    kind = CLASSES[lesion.label]
    answers = {
        "name": f"This is {kind.name}.",
        "about": kind.about,
        "describe": (
            f"A {SIZES[lesion.size]} {kind.look} in the {POSITIONS[lesion.position]} on {TONES[lesion.tone]} skin, "
            f"{'with' if lesion.hairs else 'without'} hairs."
        ),
    }
    return answers[question_id]
