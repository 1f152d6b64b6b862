"""The criteria that rank layers: which measure of actors.critic each reads, and how its numbers are shown.

Imports no torch: the driver reads this table, too.
"""

import math
from dataclasses import dataclass

# The '+' of Taylor+ and Magnitude+ (Shortened LLaMA): the first four and the last two blocks stay.
PLUS_FIRST, PLUS_LAST = 4, 2


@dataclass(frozen=True)
class Criterion:
    """One criterion: the `column` of a measure (high: much is lost), averaged with the weights of another column.

    label: names its numbers, in the unit to which `show` converts a loss. on_sets: it is measured on the pruned model
    itself, so that sets of layers can be compared. by_sample: it differs between questions. ends_stay: the first
    PLUS_FIRST and the last PLUS_LAST layers are never removed.
    """

    measure: str
    column: str
    weights: str | None
    label: str
    show: str = "as it is"
    on_sets: bool = False
    by_sample: bool = True
    ends_stay: bool = False

    def to_unit(self, loss: float) -> float:
        """Return a loss in the unit of the label."""
        return {"as it is": loss, "1 - x": 1 - loss, "exp": math.exp(min(loss, 700.0))}[self.show]


CRITERIA: dict[str, Criterion] = {
    "answer_similarity": Criterion(
        "answers", "loss", None, "similarity of the answers without it", "1 - x", on_sets=True
    ),
    "perplexity": Criterion(
        "reference", "nll", "tokens", "perplexity of the reference answers without it", "exp", on_sets=True
    ),
    "kl": Criterion("reference", "kl", "tokens", "KL divergence from the whole model (nats per token)", on_sets=True),
    "block_influence": Criterion("influence", "all", "all_tokens", "block influence"),
    "block_influence_image": Criterion("influence", "image", "image_tokens", "block influence on image tokens"),
    "block_influence_text": Criterion("influence", "text", "text_tokens", "block influence on text tokens"),
    "taylor+": Criterion("taylor", "taylor", None, "sum of |w dL/dw|", ends_stay=True),
    "magnitude+": Criterion("magnitude", "magnitude", None, "sum of |w|", by_sample=False, ends_stay=True),
    "random": Criterion("random", "random", None, "a random number", by_sample=False),
}


# Of head groups and channels, by their name in actors.narrowing.scores
WIDTH_CRITERIA = {
    "taylor": "sum of |w dL/dw| of a group's weights (second paper)",
    "magnitude": "sum of |w|",
    "activation": "sum of |w| times the norm of its input, of the weights that write",
    "random": "by seed",
}


def set_criteria() -> list[str]:
    """Return the criteria by which sets of layers can be compared."""
    return [name for name, criterion in CRITERIA.items() if criterion.on_sets]
