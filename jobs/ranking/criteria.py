"""The criteria that rank layers: which measure of actors.critic each reads, and how its numbers are shown."""

import math
from dataclasses import dataclass

from jobs.config.schema import Criterion


@dataclass(frozen=True)
class Reading:
    """One criterion: the `column` of a measure (high: much is lost), averaged with the weights of another column."""

    measure: str
    column: str
    weights: str | None
    label: str
    show: str = "as it is"

    def to_unit(self, loss: float) -> float:
        """Return a loss in the unit of the label."""
        return {"as it is": loss, "1 - x": 1 - loss, "exp": math.exp(min(loss, 700.0))}[self.show]


READINGS: dict[Criterion, Reading] = {
    "answer_similarity": Reading("answers", "loss", None, "similarity of the answers without it", "1 - x"),
    "perplexity": Reading("reference", "nll", "tokens", "perplexity of the reference answers without it", "exp"),
    "kl": Reading("reference", "kl", "tokens", "KL divergence from the whole model (nats per token)"),
    "block_influence": Reading("influence", "all", "all_tokens", "block influence"),
    "block_influence_image": Reading("influence", "image", "image_tokens", "block influence on image tokens"),
    "block_influence_text": Reading("influence", "text", "text_tokens", "block influence on text tokens"),
    "taylor+": Reading("taylor", "taylor", None, "sum of |w dL/dw|"),
    "magnitude+": Reading("magnitude", "magnitude", None, "sum of |w|"),
    "random": Reading("random", "random", None, "a random number"),
}
WITHOUT_SAMPLES = ("magnitude", "random")
# The '+' of Taylor+ and Magnitude+ (Shortened LLaMA): the first four and the last two blocks stay.
PLUS_FIRST, PLUS_LAST = 4, 2
