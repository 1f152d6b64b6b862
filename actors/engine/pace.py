"""How long the pieces of a draft are, and whether drafts pay: by what passes cost and how drafts fared so far.

A pass costs about f + x tokens' time: f for the pass itself (weights are read, operators start), x for the tokens of
the whole model that it computes. The next draft token of a row is wrong with probability h, so that of p tokens
E(p) = (1 - (1 - h)^p) / h are of use on average, the correction of a wrong one included.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import prod

WRONG, WEIGHT = 0.1, 4.0  # the rate of wrong tokens that is assumed at first, and for how many tokens it stands
FIXED = 16.0  # f, before anything was measured
FORGET = 0.98
LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
PIECES = 2  # passes that an answer's pieces take, about


class Pace:
    """Measured costs of passes, and the fate of drafts by variant; `shared` variants also stand for those not seen."""

    def __init__(self) -> None:
        self._sums = [0.0] * 5  # of 1, x, x^2, y, x y over passes: x tokens take y seconds; each weighs 1 / y^2
        self._right: defaultdict[bytes | None, float] = defaultdict(float)
        self._wrong: defaultdict[bytes | None, float] = defaultdict(float)
        self._answers = self._answer_tokens = 0

    def note_pass(self, tokens: float, seconds: float) -> None:
        """Note what a pass took that computed as many layers as `tokens` tokens of the whole model."""
        weight = 1 / max(seconds, 1e-6) ** 2
        new = (1.0, tokens, tokens * tokens, seconds, tokens * seconds)
        self._sums = [FORGET * old + weight * part for old, part in zip(self._sums, new, strict=True)]

    def note_draft(self, variant: bytes, right: int, wrong: bool, shared: bool = True) -> None:
        """Note how many tokens of a piece a variant said, too, and whether it then said another one."""
        for key in (variant, None) if shared else (variant,):
            self._right[key] += right
            self._wrong[key] += wrong

    def note_answer(self, tokens: int) -> None:
        """Note the length of an answer."""
        self._answers += 1
        self._answer_tokens += tokens

    def knows_drafts(self) -> bool:
        """Tell whether any variant has been compared with a draft."""
        return self._right[None] + self._wrong[None] > 0

    def fixed_tokens(self) -> float:
        """Return f."""
        one, x, xx, y, xy = self._sums
        spread = one * xx - x * x
        if one == 0 or spread <= 1e-3 * one * xx:  # passes of one size tell nothing
            return FIXED
        slope = (one * xy - x * y) / spread
        return max(0.0, (y - slope * x) / one / slope) if slope > 0 else FIXED

    def wrong_rate(self, variant: bytes) -> float:
        """Return h: the rate of wrong draft tokens of a variant, drawn to that of all where little is known of it."""
        everyone = (self._wrong[None] + WRONG * WEIGHT) / (self._right[None] + self._wrong[None] + WEIGHT)
        seen = self._right[variant] + self._wrong[variant]
        return max(1e-4, (self._wrong[variant] + everyone * WEIGHT) / (seen + WEIGHT))

    def length(self, variants: Sequence[bytes], width: float, room: int, first: bool, alone: bool) -> int:
        """Return how many draft tokens to check in the next pass, at most `room`; 0: none, decode the rows.

        variants: of the followers. width: what a token of all of them and their base costs, in tokens of the whole
        model. first: the pass reads the prompts anyway, and the first token costs nothing. alone: no other row waits to
        be decoded, so that tokens which all followers share save whole steps.
        """
        rows, fixed = len(variants), self.fixed_tokens()
        wrong = sum(map(self.wrong_rate, variants)) / rows
        lengths = [p for p in LENGTHS if p < room] + [room]

        def price(length: int) -> float:
            return (fixed + width * length) / (rows * _expected(wrong, length))

        best = min(lengths, key=price)
        if first:  # what it checks need not be checked in a piece, nor decoded
            worth = rows * min(1.0, price(best))
            return max(lengths, key=lambda p: worth * _expected(wrong, p) - width * (p - 1))
        saved = rows * _expected(wrong, best)
        if alone:
            saved += fixed * _expected(1 - (1 - wrong) ** rows, best)
        return best if saved > fixed + width * best else 0

    def drafts_pay(
        self, base: bytes | None, widths: Mapping[bytes, float], inputs: int, prompts: float, room: int
    ) -> bool:
        """Tell whether to decode the base first, and check its answers as drafts, or base and variants at once.

        base: the base as a variant of its own guesses, None without guesses. widths: by variant, what a token costs
        where it follows, in tokens of the whole model. prompts: tokens of all `inputs`, shared ones once. room: most
        tokens of an answer. Both ways are counted in tokens, but for what they have in common.
        """
        tokens, fixed = self._answer_tokens / self._answers if self._answers else room, self.fixed_tokens()
        rates = {variant: self.wrong_rate(variant) for variant in widths}
        followed = {variant: min(tokens, _expected(rate, tokens)) for variant, rate in rates.items()}
        at_once = fixed * tokens + inputs * sum(followed.values())
        guessed = 0.0 if base is None else min(tokens, _expected(self.wrong_rate(base), tokens))
        none_leaves = prod(1 - rate for rate in rates.values()) ** inputs  # at a token
        steps = tokens - _expected(1 - none_leaves, tokens)  # from the first that leaves its draft on
        first = prompts + fixed * (tokens - guessed)
        check = inputs * (max(followed.values()) + sum(followed[variant] * width for variant, width in widths.items()))
        return first + check + fixed * (PIECES + steps) < at_once


class WholeDrafts(Pace):
    """Whole drafts, whatever they cost: what there is to compare with, and what does not depend on a clock."""

    def knows_drafts(self) -> bool:
        """No trial is needed."""
        return True

    def drafts_pay(self, base, widths, inputs, prompts, room) -> bool:
        """Drafts are always taken."""
        return True

    def length(self, variants, width, room, first, alone) -> int:
        """All that is left of a draft is one piece."""
        return room


def _expected(wrong: float, length: float) -> float:
    return (1 - (1 - wrong) ** length) / wrong
