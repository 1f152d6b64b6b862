"""Losses of questions without sets of layers, or under choices of an option per layer; measured once and kept.

A measurement's key is (model, question, removed set or choice, decoding).

The table grows by one file per finished unit of work, in run_dir/measurements/<measure>-<hash of what decides
the numbers>. All rankings and searches read it, so nothing is measured twice.
"""

import json
import logging
from collections.abc import Iterable, Sequence
from math import isfinite

from actors.criteria import CRITERIA
from actors.maths.losses import Losses, tabulate_losses
from actors.maths.statistics import loss_outliers
from actors.specs import Conversation, DraftContext
from cluster.artifacts import digest
from cluster.tables import PartTable
from jobs.core.facts import RoundedFacts
from jobs.core.run import Run
from jobs.core.stage import Source, Stage
from jobs.core.units import in_units, whole_images

LOG = logging.getLogger("jobs.ranking")

VERSION = 1
Removed = tuple[int, ...]


class NothingRanked(RuntimeError):
    """No loss is a finite number, so none is the smallest."""


def check_ranked(criterion: str, losses: Sequence[float]) -> None:
    """Raise NothingRanked if no loss is a finite number."""
    if not any(isfinite(loss) for loss in losses):
        raise NothingRanked(
            f"The {criterion} of all {len(losses)} candidates of a search is NaN or infinite, so none can be chosen: "
            "if model.dtype is float16, which overflows early, set it to bfloat16 or float32; else rank by another "
            "criterion (ablate.criterion; for jobs.joint, joint.damage)."
        )


class Measurements:
    """Measures what the tables lack, through a pool of actors.critic:LayerCritic.

    `column` of its rows holds the removed set, `whole` is that of the model as it is. `failed` tells why samples were
    left out: a sample whose measurement failed three times is not measured again.
    """

    column = "removed"
    whole: Removed = ()

    def __init__(self, run: Run, pool, model: Stage | Source, data: Stage, samples: Sequence[Conversation]):
        self._run, self._pool, self._samples = run, pool, list(samples)
        self._made_from = {"version": VERSION, "model": model.name, "data": data.name, "dtype": run.config.model.dtype}
        self._tables: dict[str, PartTable] = {}
        self._rows: dict[str, dict[tuple[str, Removed], dict]] = {}
        self.failed: dict[str, str] = {}

    def losses(self, criterion: str, sets: Sequence[Removed], base: Removed = (), label: str = "") -> Losses:
        """Return what every sample loses by `criterion` without each of `sets`, measuring what is missing.

        base: a set measured before, whose answers resemble those of `sets`: they become drafts, and work is shared.
        RuntimeError: every sample failed.
        """
        reading = CRITERIA[criterion]
        samples = self._samples
        if not reading.by_sample:  # any sample gives the same number
            samples = [sample for sample in samples if sample.id not in self.failed][:1]
        sets = [self.key(removed) for removed in sets]
        self._measure(reading.measure, samples, sets, self.key(base or self.whole), label or criterion)
        rows_by_key = self._rows[reading.measure]
        whole = [sample for sample in samples if all((sample.id, removed) in rows_by_key for removed in sets)]
        if not whole:
            raise RuntimeError(f"No question could be measured; the first failure: {next(iter(self.failed.values()))}")
        table = [[rows_by_key[sample.id, removed] for removed in sets] for sample in whole]
        return tabulate_losses(
            [[row[reading.column] for row in rows] for rows in table],
            [[row[reading.weights] if reading.weights else 1 for row in rows] for rows in table],
            [sample.image for sample in whole],
        )

    def key(self, removed: Iterable[int]) -> Removed:
        """Return what identifies a set of layers."""
        return tuple(sorted(removed))

    def outliers(self, singles: Sequence[Removed]) -> list[int]:
        """Return the layers whose single removal costs far more perplexity than the others'."""
        far = loss_outliers(self.losses("perplexity", singles, label="outliers").means_K)
        return [layer for (layer,), is_far in zip(singles, far, strict=True) if is_far]

    def _measure(self, measure: str, samples: list[Conversation], sets: list[Removed], base: Removed, label: str):
        rows_by_key = self._read_rows(measure)
        if measure == "answers":  # all answers are compared with the whole model's
            sets = [self.whole, *sets]
        missing = {
            sample.id: [removed for removed in dict.fromkeys(sets) if (sample.id, removed) not in rows_by_key]
            for sample in samples
            if sample.id not in self.failed
        }
        todo = [sample for sample in samples if missing.get(sample.id)]
        unit = self._run.config.ablate.unit
        units = sorted(whole_images(todo, unit), key=lambda part: -_cost(part, missing))

        def sets_of(part: list[Conversation]) -> list[Removed]:
            return list(dict.fromkeys(removed for sample in part for removed in missing[sample.id]))

        def arguments(part: list[Conversation]) -> tuple:
            return measure, part, sets_of(part), base, self._drafts(measure, part, base)

        if not units:
            return
        for part, outcome in in_units(self._pool, "measure", units, arguments, label):  # longest first
            if outcome.error:
                self.failed[part[0].id] = outcome.error
                LOG.warning(f"{label}: {part[0].id} failed three times and is left out: {outcome.error}")
                continue
            new = [row for row in outcome.value if (row["sample_id"], tuple(row[self.column])) not in rows_by_key]
            self._tables[measure].add(digest([[sample.id for sample in part], sets_of(part)]), new)
            rows_by_key.update(self._index_rows(new))

    def _drafts(self, measure: str, part: list[Conversation], base: Removed):
        rows_by_key = self._rows[measure]
        needed = [((sample.id, self.whole), (sample.id, base)) for sample in part]
        if measure != "answers" or not all(key in rows_by_key for keys in needed for key in keys):
            return None
        return [DraftContext(rows_by_key[whole]["answer"], rows_by_key[draft]["token_ids"]) for whole, draft in needed]

    def _read_rows(self, measure: str) -> dict[tuple[str, Removed], dict]:
        if measure not in self._rows:
            recipe = {**self._made_from, "measure": measure, **self._deciding_settings(measure)}
            folder = self._run.folder / "measurements" / f"{measure}-{digest(recipe)}"
            self._tables[measure] = PartTable(folder)
            (folder / "recipe.json").write_text(json.dumps(recipe, indent=1))
            self._rows[measure] = self._index_rows(self._tables[measure].all_rows())
        return self._rows[measure]

    def _deciding_settings(self, measure: str) -> dict:
        config = self._run.config
        if measure == "answers":
            embedder = self._run.embedder_identity(config.ablate.embedder)
            return {"max_new_tokens": config.generation.max_new_tokens, "embedder": embedder}
        return {"seed": config.seed} if measure == "random" else {}

    def _index_rows(self, rows: Iterable[dict]) -> dict[tuple[str, Removed], dict]:
        return {(row["sample_id"], tuple(row[self.column])): row for row in rows}


class ChoiceMeasurements(Measurements):
    """The same for choices, one option per layer, through a pool of actors.choices:ChoiceCritic.

    rounded: the stage whose artifact holds the rounded layers.
    """

    column = "choice"

    def __init__(self, run: Run, pool, model: Stage | Source, data: Stage, samples: Sequence[Conversation], rounded):
        super().__init__(run, pool, model, data, samples)
        self._made_from["rounded"] = rounded.name
        self.whole = (16,) * run.facts(rounded, RoundedFacts)["layers"]

    def key(self, removed: Iterable[int]) -> Removed:
        """Return what identifies a choice: its options, in the order of the layers."""
        return tuple(removed)


def _cost(part: list[Conversation], missing: dict[str, list[Removed]]) -> int:
    return sum(len(missing[sample.id]) * (len(sample.question) + len(sample.reference)) for sample in part)
