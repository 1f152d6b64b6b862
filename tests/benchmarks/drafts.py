"""A pace that always takes whole drafts, for benchmarks."""

from actors.engine.pace import Pace


class AlwaysDrafts(Pace):
    """Whole drafts, whatever they cost."""

    def knows_drafts(self) -> bool:
        """True: no trial is needed."""
        return True

    def drafts_pay(self, base, widths, inputs, prompts, room) -> bool:
        """True, always."""
        return True

    def length(self, variants, width, room, first, alone) -> int:
        """Return the whole rest."""
        return room
