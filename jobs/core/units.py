"""Questions in units of work: those of a failed unit are retried singly, so that only broken ones are left out."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from actors.specs import Conversation, Sample
from jobs.core.progress import Progress

if TYPE_CHECKING:
    from cluster.pool import Outcome, Pool

T = TypeVar("T")
S = TypeVar("S", Sample, Conversation)


def whole_images(samples: Sequence[S], most: int) -> list[list[S]]:
    """Put samples into units of at most `most`: those about one image together, as they share its prefill."""
    by_image: dict[str | None, list[S]] = {}
    for sample in samples:
        by_image.setdefault(sample.image, []).append(sample)
    units: list[list[S]] = []
    for samples_of_image in by_image.values():
        for piece in (samples_of_image[i : i + most] for i in range(0, len(samples_of_image), most)):
            if units and len(units[-1]) + len(piece) <= most:
                units[-1] += piece
            else:
                units.append(piece)
    return units


def in_units(
    pool: "Pool", method: str, units: Sequence[list[T]], arguments: Callable[[list[T]], tuple], label: str
) -> Iterator[tuple[list[T], "Outcome"]]:
    """Call `method(*arguments(unit))` for every unit; yield (unit, outcome) as they come, with a progress bar.

    An outcome that failed (three times) belongs to a single question.
    """
    broken = []
    with Progress(label, len(units)) as progress:
        for unit, outcome in _mapped(pool, method, units, arguments):
            progress.step(note="units")
            if outcome.error and len(unit) > 1:
                broken.append(unit)
            else:
                yield unit, outcome
    singles = [[question] for unit in broken for question in unit]
    if not singles:
        return
    with Progress(f"{label}, one by one", len(singles)) as progress:
        for single, outcome in _mapped(pool, method, singles, arguments):
            progress.step(note="questions")
            yield single, outcome


def _mapped(pool, method, units, arguments) -> Iterator[tuple[list, "Outcome"]]:
    for outcome in pool.map(method, [(number, arguments(unit)) for number, unit in enumerate(units)]):
        yield units[outcome.key], outcome
