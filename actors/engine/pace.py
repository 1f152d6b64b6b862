"""How long the pieces of a draft are: by what passes and tokens were measured to cost, and by how drafts fared so far.

A pass costs about f + w tokens' time: f for the pass itself (weights are read, operators start), w for the tokens that
its rows read. A row's next draft token is wrong with probability h. A piece of p tokens brings a follower
E(p) = (1 - (1 - h)^p) / h tokens on average, and what it reads behind a wrong token is lost. The pace is the p that
costs least per token; and no piece at all where decoding the rows, beside others that are decoded anyway, costs less.
"""

from collections import defaultdict
from collections.abc import Hashable, Sequence

WRONG, WEIGHT = 0.05, 4.0  # the rate of wrong tokens that is assumed at first, and for how many tokens it stands
FIXED = 16.0  # tokens whose time a pass costs, before anything was measured
FORGET = 0.98
LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)


class Pace:
    """Measured costs of passes, and the fate of drafts by variant."""

    def __init__(self) -> None:
        self._sums = [0.0] * 5  # of 1, x, x^2, y, x y over passes: x tokens take y seconds; each weighs 1 / y^2
        self._right: defaultdict[Hashable, float] = defaultdict(float)
        self._wrong: defaultdict[Hashable, float] = defaultdict(float)

    def note_pass(self, tokens: float, seconds: float) -> None:
        """Note what a pass took that computed as many layers as `tokens` tokens of the whole model."""
        weight = 1 / max(seconds, 1e-6) ** 2
        new = (1.0, tokens, tokens * tokens, seconds, tokens * seconds)
        self._sums = [FORGET * old + weight * part for old, part in zip(self._sums, new, strict=True)]

    def note_draft(self, variant: Hashable, right: int, wrong: bool) -> None:
        """Note how many tokens of a piece a variant said, too, and whether it then said another one."""
        for key in (variant, None):  # None: of all
            self._right[key] += right
            self._wrong[key] += wrong

    def fixed_tokens(self) -> float:
        """Return f: how many tokens' time a pass costs by itself."""
        one, x, xx, y, xy = self._sums
        spread = one * xx - x * x
        if one == 0 or spread <= 1e-3 * one * xx:  # passes of one size tell nothing
            return FIXED
        slope = (one * xy - x * y) / spread
        return max(0.0, (y - slope * x) / one / slope) if slope > 0 else FIXED

    def wrong_rate(self, variant: Hashable) -> float:
        """Return h: the rate of wrong draft tokens of a variant, drawn to that of all where little is known of it."""
        everyone = (self._wrong[None] + WRONG * WEIGHT) / (self._right[None] + self._wrong[None] + WEIGHT)
        told = self._right[variant] + self._wrong[variant]
        return (self._wrong[variant] + everyone * WEIGHT) / (told + WEIGHT)

    def length(self, variants: Sequence[Hashable], width: float, room: int, first: bool, alone: bool) -> int:
        """Return how many draft tokens to check in the next pass, at most `room`; 0: none, decode the rows.

        variants: of the followers. width: what a token of all of them and their base costs, in tokens of the whole
        model. first: the pass reads the prompts anyway. alone: no other row is waiting to be decoded, so that tokens
        which all followers share save whole steps.
        """
        rows, fixed = len(variants), self.fixed_tokens()
        wrong = max(1e-4, sum(map(self.wrong_rate, variants)) / rows)
        any_wrong = 1 - (1 - wrong) ** rows

        def cost(length: int) -> float:
            return fixed + width * length

        lengths = [p for p in LENGTHS if p < room] + [room]
        best = min(lengths, key=lambda p: cost(p) / _expected(wrong, p))
        saved = rows * _expected(wrong, best) + (fixed * _expected(any_wrong, best) if alone else 0)
        return best if first or saved > cost(best) else 0


def _expected(wrong: float, length: int) -> float:
    return (1 - (1 - wrong) ** length) / wrong
