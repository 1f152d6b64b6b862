"""Measuring once, keeping it, and searching sets of layers; with a pool that computes instead of Ray."""

import itertools
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from actors.specs import Conversation, DraftContext
from cluster.pool import Outcome
from cluster.tables import read_table
from jobs.core.options import load_config
from jobs.core.run import Run
from jobs.core.stage import Source, Stage
from jobs.core.workers import Workers
from jobs.ranking import calibration
from jobs.ranking.measurements import Measurements
from jobs.ranking.select import beam, evolve

SAMPLES = [Conversation(f"s{i}", f"image{i // 2}", "What?", "word " * (1 + i % 4)) for i in range(10)]
# Alone, layers 0 to 3 cost the least; together, 0 and 1 cost much, as one can stand in for the other.
ALONE = [0.01, 0.02, 0.03, 0.04, 0.05, 0.06]


def loss(removed: tuple[int, ...]) -> float:
    return sum(ALONE[layer] for layer in removed) + (0.5 if {0, 1} <= set(removed) else 0.0)


class FakePool:
    """Computes `loss` for every pair; breaks on samples in `poison`; notes what it was asked."""

    def __init__(self, poison: tuple[str, ...] = ()):
        self.poison, self.asked, self.units = poison, Counter(), []

    def map(self, method, items):
        assert method == "measure"
        for key, (measure, part, sets, base, known) in items:
            self.units.append((measure, [s.id for s in part], tuple(sets), base, known))
            if any(sample.id in self.poison for sample in part):
                yield Outcome(key, error="ValueError: a truncated image", attempts=3)
                continue
            self.asked.update((measure, sample.id, removed) for sample in part for removed in sets)
            rows = []
            for sample in part:
                for removed in sets:
                    value = loss(removed) + 0.001 * int(sample.id[1:])
                    found = {"loss": value, "nll": value, "kl": value, "tokens": 2, "magnitude": value}
                    answer = {"answer": f"{sample.id} {removed}", "token_ids": [1, *removed]}
                    rows.append({"sample_id": sample.id, "removed": list(removed), **found, **answer})
            yield Outcome(key, value=rows)


def measurements(folder: Path, pool: FakePool, samples=SAMPLES, **options: str) -> Measurements:
    run = Run(load_config("configs/derm-tiny.yaml", [("run_dir", str(folder)), *options.items()]))
    return Measurements(run, pool, Source("model-1", "x"), Stage("data", 1, {}, (), None), samples)


def test_each_pair_is_measured_once_and_found_again_by_the_next_run(tmp_path):
    first, second = FakePool(), FakePool()
    measured = measurements(tmp_path, first)
    found = measured.losses("answer_similarity", [(1,), (2,)])
    assert found.means_K == pytest.approx([0.02 + 0.0045, 0.03 + 0.0045])
    assert found.clusters_N.tolist() == [i // 2 for i in range(10)]
    again = measurements(tmp_path, second)
    again.losses("answer_similarity", [(2,), (3,), (1,)])
    assert set(first.asked.values()) == {1} and set(second.asked.values()) == {1}
    assert {removed for _, _, removed in second.asked} == {(3,)}
    (folder,) = tmp_path.glob("measurements/answers-*")
    keys = [(r["sample_id"], tuple(r["removed"])) for f in folder.glob("*.parquet") for r in read_table(f)]
    assert Counter(keys) == Counter(itertools.product([s.id for s in SAMPLES], [(), (1,), (2,), (3,)]))


def test_other_decoding_settings_are_another_table(tmp_path):
    measurements(tmp_path, FakePool()).losses("answer_similarity", [(1,)])
    pool = FakePool()
    measurements(tmp_path, pool, **{"generation.max_new_tokens": "7"}).losses("answer_similarity", [(1,)])
    assert pool.asked and len(list(tmp_path.glob("measurements/answers-*"))) == 2
    pool = FakePool()
    reference = measurements(tmp_path, pool)
    reference.losses("perplexity", [(1,)])
    reference.losses("kl", [(1,)])
    assert len(pool.asked) == len(SAMPLES), "perplexity and KL are columns of one measure"
    measurements(tmp_path, pool, **{"generation.max_new_tokens": "7"}).losses("kl", [(1,)])
    assert len(pool.asked) == len(SAMPLES), "forced answers do not depend on the longest answer"


def test_a_poison_sample_is_left_out_with_its_reason_and_its_units_others_are_kept(tmp_path, capsys):
    measured = measurements(tmp_path, FakePool(poison=("s5",)))
    found = measured.losses("answer_similarity", [(1,)])
    assert len(found.values_NK) == 9
    assert measured.failed == {"s5": "ValueError: a truncated image"}
    assert "s5 failed three times and is left out: ValueError: a truncated image" in capsys.readouterr().err
    pool = FakePool(poison=("s5",))
    measured._pool = pool
    measured.losses("answer_similarity", [(2,)])
    assert "s5" not in [sample for _, part, *_ in pool.units for sample in part]


def test_when_every_sample_fails_the_reason_is_told(tmp_path):
    pool = FakePool(poison=tuple(s.id for s in SAMPLES))
    with pytest.raises(RuntimeError, match="a truncated image"):
        measurements(tmp_path, pool).losses("answer_similarity", [(1,)])


def test_the_dearest_units_come_first_and_hold_a_few_samples(tmp_path):
    pool = FakePool()
    measurements(tmp_path, pool, **{"ablate.unit": "3"}).losses("answer_similarity", [(1,), (2,)])
    costs = [sum(len(SAMPLES[int(s[1:])].reference) + 5 for s in part) for _, part, *_ in pool.units]
    assert costs == sorted(costs, reverse=True) and len(costs) == 5  # two questions about each image
    assert {sets for _, _, sets, *_ in pool.units} == {((), (1,), (2,))}


def test_a_later_round_gets_the_bases_answers_as_drafts(tmp_path):
    pool = FakePool()
    measured = measurements(tmp_path, pool)
    measured.losses("answer_similarity", [(1,)])
    measured.losses("answer_similarity", [(1, 3)], base=(1,))
    _, part, sets, base, known = pool.units[-1]
    assert (sets, base) == (((1, 3),), (1,))
    assert known == [DraftContext(f"{s} ()", [1, 1]) for s in part]
    measured.losses("kl", [(1, 3)], base=(1,))
    assert pool.units[-1][-1] is None


def test_criteria_without_samples_are_measured_once(tmp_path):
    pool = FakePool()
    measurements(tmp_path, pool).losses("magnitude+", [(1,), (2,)])
    assert [part for _, part, *_ in pool.units] == [["s0"]]


def test_criteria_without_samples_pass_over_a_poison_sample(tmp_path):
    pool = FakePool(poison=("s0", "s1"))
    measured = measurements(tmp_path, pool)
    measured.losses("answer_similarity", [(1,)])
    pool.units.clear()
    assert measured.losses("magnitude+", [(1,), (2,)]).values_NK == pytest.approx(np.array([[0.022, 0.032]]))
    assert [part for _, part, *_ in pool.units] == [["s2"]]


@pytest.mark.parametrize("criterion", ["answer_similarity", "perplexity"])
def test_workers_load_an_embedder_where_answers_are_compared(tmp_path, monkeypatch, criterion):
    """A name that is none stops the run when its first worker starts, and only then if it is needed."""
    asked = []

    @contextmanager
    def replicas(self, model, target, embedder, **_):
        asked.append(embedder)
        yield SimpleNamespace(call=lambda method: 12)

    monkeypatch.setattr(Workers, "replicas", replicas)
    monkeypatch.setattr(calibration, "calibration_samples", lambda *_: SAMPLES)
    run = Run(load_config("configs/derm-tiny.yaml", [("run_dir", str(tmp_path)), ("ablate.embedder", "no/such")]))
    run.sources.note_seen(Source("model-1", "x"))
    with calibration.open_measurements(run, Source("model-1", "x"), Source("data", "x"), [criterion]) as (_, layers):
        assert layers == 12
    assert asked == (["no/such"] if criterion == "answer_similarity" else [None])


def best_set(size: int, order) -> tuple[int, ...]:
    return min((loss(s), s) for s in itertools.combinations(sorted(order), size))[1]


@pytest.mark.parametrize("search", ["greedy", "beam", "evolution"])
def test_searches_find_the_best_set_that_one_shot_misses(tmp_path, search):
    options = {"prune.layers": "3", "prune.search": search}
    measured = measurements(tmp_path, FakePool(), **options)
    run, order, steps = measured._run, list(range(6)), []
    one_shot = (0, 1, 2)
    note = lambda kind, sets, losses: steps.append((kind, sets, losses))  # noqa: E731
    if search == "evolution":
        found = evolve(run, measured, order, one_shot, note)
    else:
        found = beam(run, measured, order, 1 if search == "greedy" else 3, note)
    assert found == best_set(3, order) == (0, 2, 3) and loss(found) < loss(one_shot)
    assert steps and all(len(sets) == len(losses) for _, sets, losses in steps)


@pytest.mark.parametrize("search", ["greedy", "beam", "evolution"])
def test_a_set_whose_loss_is_no_number_is_never_chosen(tmp_path, monkeypatch, search):
    """Of three pairs the first is NaN; where all are, the search says so and chooses none."""
    options = {"prune.layers": "2", "prune.search": search, "ablate.criterion": "perplexity"}

    def searched(folder) -> tuple[int, ...]:
        measured = measurements(folder, FakePool(), **options)
        if search == "evolution":
            return evolve(measured._run, measured, [0, 1, 2], (0, 1), lambda *_: None)
        return beam(measured._run, measured, [0, 1, 2], 1 if search == "greedy" else 3, lambda *_: None)

    known = {(1,): 0.02, (0,): 0.01, (2,): 0.03, (0, 2): 0.04, (1, 2): 0.05}
    monkeypatch.setattr("tests.jobs.test_measurements.loss", lambda removed: known.get(removed, np.nan))
    assert searched(tmp_path / "one") == (0, 2)
    known.clear()
    with pytest.raises(RuntimeError, match=r"The perplexity of all \d candidates .*model\.dtype.*ablate\.criterion"):
        searched(tmp_path / "all")


def drafts_of(base: tuple[int, ...], part: list[str]) -> list[DraftContext]:
    return [DraftContext(f"{sample} ()", [1, *base]) for sample in part]


@pytest.mark.parametrize("search", ["greedy", "beam"])
def test_a_set_is_measured_with_its_survivors_answers_as_drafts(tmp_path, search):
    """The base of every set is the survivor of the round before that it extends, and its answers are handed over."""
    pool, survivors = FakePool(), [[()]]
    measured = measurements(tmp_path, pool, **{"prune.layers": "3", "prune.search": search})
    width = 1 if search == "greedy" else 3

    def note(kind, sets, losses):
        survivors.append([removed for _, removed in sorted(zip(losses, sets, strict=True))[:width]])

    beam(measured._run, measured, list(range(6)), width, note)
    for measure, part, sets, base, known in pool.units:
        assert measure == "answers" and base in survivors[len(base)]
        assert all(set(base) < set(removed) and len(removed) == len(base) + 1 for removed in sets if removed)
        assert known == (drafts_of(base, part) if base else None)
    assert {len(base) for _, _, _, base, _ in pool.units} == {0, 1, 2}
    assert len({base for _, _, _, base, _ in pool.units}) == 1 + 2 * width


def test_mutants_are_measured_with_the_best_sets_answers_as_drafts(tmp_path):
    """By KL and by answers, of which the best set's are known but in its first generation."""
    pool, seen, bests = FakePool(), 0, []
    measured = measurements(tmp_path, pool, **{"prune.layers": "3", "prune.search": "evolution"})

    def note(kind, sets, losses):
        nonlocal seen
        if kind.endswith("KL"):
            return
        bests.append(sets[0])
        for measure, part, _, base, known in pool.units[seen:]:
            assert base == sets[0], measure
            assert known == (drafts_of(base, part) if measure == "answers" and len(bests) > 1 else None)
        seen = len(pool.units)

    evolve(measured._run, measured, list(range(6)), (0, 1, 2), note)
    assert bests[0] == (0, 1, 2) and len(set(bests)) > 1
    handed = {base for _, _, _, base, known in pool.units if known}
    assert handed & set(bests[1:]), "no later generation measured answers"


def test_a_beam_finds_what_greedy_cannot(tmp_path, monkeypatch):
    """Layer 0 is the cheapest alone, but the best pair is (4, 5)."""
    table = {frozenset(): 0.0, **{frozenset({layer}): ALONE[layer] for layer in range(6)}}
    monkeypatch.setattr(
        "tests.jobs.test_measurements.loss",
        lambda removed: table.get(frozenset(removed), 0.0 if set(removed) == {4, 5} else 1.0 + sum(removed)),
    )
    measured = measurements(tmp_path, FakePool(), **{"prune.layers": "2", "prune.search": "beam"})
    quiet = lambda *_: None  # noqa: E731
    assert beam(measured._run, measured, list(range(6)), 1, quiet) != (4, 5)
    assert beam(measured._run, measured, list(range(6)), 6, quiet) == (4, 5)


def test_evolution_measures_answers_of_the_survivors_only(tmp_path):
    options = {"prune.layers": "3", "prune.search": "evolution", "prune.survivors": "2", "prune.generations": "2"}
    pool = FakePool()
    measured = measurements(tmp_path, pool, **options)
    evolve(measured._run, measured, list(range(6)), (0, 1, 2), lambda *_: None)
    kinds = Counter(measure for measure, _, _ in pool.asked)
    assert kinds["answers"] <= len(SAMPLES) * (2 + 2 * 2) < kinds["reference"]
