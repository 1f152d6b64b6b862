"""The joint choice: its memory is the estimate's, and its search finds what counting all choices finds."""

from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest

from actors.estimate import architecture, estimate, layer_bytes
from actors.maths.losses import Losses
from actors.specs import Conversation
from jobs import joint
from jobs.allocation.choice import AllocationSearch, Memory, format_choice, single_changes
from jobs.config.joint import JointConfig
from jobs.core.options import load_config
from jobs.core.run import Run
from jobs.core.stage import Stage
from jobs.ranking import measurements
from jobs.ranking.measurements import ChoiceMeasurements, Measurements, NothingRanked
from jobs.searching.memory import device_gib
from jobs.searching.rows import estimates
from jobs.searching.sizing import make_setting
from jobs.searching.space import Setting
from tests.jobs.here import run_with
from tests.tiny import llava_7b, tiny_config

OPTIONS = (0, 3, 4, 8, 16)


@pytest.fixture
def memory(tmp_path) -> Memory:
    return joint.memory_of(run_with(tmp_path, joint__options=str(list(OPTIONS))))


def test_the_program_adds_up_to_the_estimate(memory):
    bytes_MLO, left_M = memory.program(1_600_000)
    random = np.random.default_rng(0)
    for _ in range(20):
        options = random.integers(len(OPTIONS), size=10)
        options[0] = 2  # something is rounded, so that one weight is unpacked at a time
        choice = tuple(OPTIONS[option] for option in options)
        summed = bytes_MLO[:, range(10), options].sum(1) - left_M + 1_600_000
        assert summed.tolist() == memory.moments(choice)
        assert memory.total(choice) == max(summed)


def test_the_memory_is_the_estimate_of_the_stored_layout(memory):
    whole = (16,) * 10
    sizes = estimate(memory.shapes, memory.setting)
    assert memory.total(whole) == sizes["total_bytes"]
    four = (4, *whole[1:])
    stored, *_ = (given - held for given, held in zip(memory.moments(four), memory.moments(whole), strict=True))
    weights = 4 * 64 * 64 + 3 * 64 * 192
    # 4 bits, scales of 2 bytes and zero points of half a byte per group of 64, 16 bytes of shape a linear
    assert stored == weights // 2 + weights // 64 * 5 // 2 + 7 * 16 - 4 * weights  # from float32


@pytest.mark.parametrize("options", [{}, {"model__dtype": "float16", "replicas__gpus": 1}])
def test_a_uniform_choice_takes_what_the_search_says_but_for_its_layout(options, tmp_path):
    run = run_with(tmp_path, prune__order="[1, 2, 4]", **options)
    memory, four = joint.memory_of(run), (4, 0, 0, *[4] * 7)
    chosen = [Setting(2, "none", "awq", 4), Setting(0, "none", "none", 16)]
    uniform, whole = estimates(run, [SimpleNamespace(setting=one) for one in chosen])
    given = replace(memory.setting, method="awq")
    packed, theirs = (layer_bytes(memory.shapes.layers[0], 4, one) for one in (memory.setting, given))
    assert memory.total(four) - uniform * 2**30 == pytest.approx(8 * (packed - theirs), abs=16)
    assert abs(packed - theirs) < 0.01 * theirs
    assert device_gib(run.config, memory.shapes, "mixed", four) * 2**30 == pytest.approx(memory.total(four))
    assert memory.total((16,) * 10) == pytest.approx(whole * 2**30)
    assert (memory.context > 0) == bool(options) and memory.setting.images == 1


def test_the_architecture_of_another_model_is_not_counted(tmp_path, memory):
    assert (
        joint.memory_of(run_with(tmp_path, estimate__architecture="/no/config.json")).shapes.parts
        == memory.shapes.parts
    )


def test_llava_7b_at_4_bits_takes_what_the_estimate_says():
    shapes = architecture(llava_7b())
    setting = make_setting(load_config(None, [("model.dtype", "float16")]), "mixed", (16,) * 32)  # a question of text
    memory = Memory(shapes, setting, (0, 4, 16), 0)
    assert memory.total((4,) * 32) / 2**30 == pytest.approx(4.5, rel=0.06)  # the paper's Table 3


def test_single_changes_leave_a_layer():
    assert single_changes((4, 0), (0, 4)) == {(1, 1): (4, 4)}
    assert len(single_changes((16, 16, 16), OPTIONS)) == 12
    assert format_choice((4, 0, 16)) == "4 - 16"


@pytest.fixture
def five() -> Memory:
    """The memory of a model of five layers: few enough to count all choices."""
    config = load_config(None, [])
    shapes = architecture(tiny_config("clip-llama"))
    return Memory(shapes, make_setting(config, "mixed", (16,) * 5), OPTIONS, 0)


class Additive:
    """Stands for measurements: every option costs its own damage, and pairs of removals more."""

    whole = (16,) * 5

    def __init__(self, seed: int, pairs: float = 0.0):
        random = np.random.default_rng(seed)
        self._damage = {0: random.random(5) * 4, 3: random.random(5), 4: random.random(5) / 4}
        self._damage |= {8: np.full(5, 0.01), 16: np.zeros(5)}
        self._pairs = pairs

    def damage(self, choice) -> float:
        gone = [layer for layer, bits in enumerate(choice) if not bits]
        close = sum(1 for one in gone if one + 1 in gone)
        return sum(self._damage[bits][layer] for layer, bits in enumerate(choice)) + self._pairs * close

    def losses(self, criterion, choices, label="") -> Losses:
        values = np.array([[self.damage(choice) for choice in choices]])
        return Losses(values, np.ones_like(values), np.zeros(1, dtype=int))


def settings(**changes) -> JointConfig:
    return JointConfig(options=list(OPTIONS), **changes)


def least(measured: Additive, memory: Memory, budget: int) -> float:
    """The least damage of all choices that are within the budget, each of them looked at."""
    every = (choice for choice in product(OPTIONS, repeat=5) if any(choice))
    return min(measured.damage(choice) for choice in every if memory.total(choice) <= budget)


@pytest.mark.parametrize("seed", [3, 5])
def test_additive_damage_is_solved_in_the_first_round(five, seed):
    uniform = (0, 0, 4, 4, 4)
    measured, budget = Additive(seed), five.total(uniform)
    search = AllocationSearch(measured, five, budget, settings(rounds=1))
    search.run([uniform])
    assert search.tried[search.best[0]]["kl"] == pytest.approx(least(measured, five, budget))
    assert uniform in search.tried and all(search.fits(choice) for choice in search.tried)
    for row in search.tried.values():
        assert row["predicted"] == pytest.approx(row["kl"])
    assert len(search.singles) == 5 * 4


class Silent(Additive):
    """Says nothing where any of these layers has 3 bits."""

    def __init__(self, layers: set[int]):
        super().__init__(3)
        self._layers = layers

    def damage(self, choice) -> float:
        return np.nan if any(choice[layer] == 3 for layer in self._layers) else super().damage(choice)


def test_a_choice_that_says_nothing_is_not_among_the_best(five):
    threes = (3, 3, 3, 3, 3)
    search = AllocationSearch(Silent({2}), five, five.total(threes), settings())
    search.run([threes])
    assert search.tried[threes]["predicted"] is None and threes not in search.best
    assert all(np.isfinite(search.tried[choice]["kl"]) for choice in search.best)


def test_where_every_change_says_nothing_the_search_says_why(five, monkeypatch):
    for damage in (lambda *_: np.nan, lambda _, choice: 0.0 if choice == (16,) * 5 else np.nan):
        monkeypatch.setattr(Additive, "damage", damage)
        with pytest.raises(NothingRanked, match=r"kl of all \d+ candidates .*model\.dtype.*joint\.damage"):
            AllocationSearch(Additive(3), five, five.total((4,) * 5), settings()).run([])


def test_depths_at_which_every_set_says_nothing_are_no_rivals(tmp_path, monkeypatch):
    def make(own: Run, stage) -> None:
        if stage == 3:
            raise NothingRanked

    monkeypatch.setattr(joint.ablate, "stage", lambda *_: "scores")
    monkeypatch.setattr(joint.select, "stage", lambda own, *_: own.config.prune.layers)
    monkeypatch.setattr(Run, "make", make)
    monkeypatch.setattr(Run, "facts", lambda own, stage, kind: {"order": range(9), "removed": [stage]})
    assert joint.removal_order(run_with(tmp_path, prune__search="greedy"), None, None, 6) == (
        [[], [1], [2]],
        ["scores", 1, 2],
    )


def test_a_second_round_mends_what_does_not_add_up(five):
    """Seed 7: what the first round proposes has neighbours removed, which costs more than it predicts."""
    measured, budget = Additive(7, pairs=2.0), five.total((0, 0, 4, 4, 4))
    found = {}
    for rounds in (1, 3):
        search = AllocationSearch(measured, five, budget, settings(rounds=rounds, proposed=2))
        search.run([])
        found[rounds] = search.tried[search.best[0]]
    assert found[1]["predicted"] < found[1]["kl"]
    assert found[3]["kl"] < found[1]["kl"] - 0.5
    assert found[3]["kl"] == pytest.approx(least(measured, five, budget))


def test_uniform_choices_and_the_budget(memory, tmp_path):
    sets = [[], [3], [3, 5], [3, 5, 7]]
    run = run_with(tmp_path, prune__layers=2)
    budget = joint.budget_of(run, memory, sets)
    assert budget == memory.total((4, 4, 4, 0, 4, 0, 4, 4, 4, 4))
    fours = [(4, 4, 4, 0, 4, 0, 4, 4, 4, 4), (4, 4, 4, 0, 4, 0, 4, 0, 4, 4)]  # as few layers out as it takes, and fewer
    for count in (1, 2, 9):
        found = joint.uniform_choices(memory, sets, budget, count)
        assert [choice for choice in found if max(choice) == 4] == fours[:count]
        assert all(memory.total(choice) <= budget for choice in found)
    assert joint.budget_of(run_with(tmp_path, joint__budget_gib=0.5), memory, sets) == 2**29
    with pytest.raises(ValueError, match=r"prune.layers 4 at 4 bits, but only 3 layers"):
        joint.budget_of(run_with(tmp_path, prune__layers=4), memory, sets)


def test_a_budget_below_everything_says_the_least(five):
    with pytest.raises(ValueError, match="the least possible is"):
        AllocationSearch(Additive(3), five, 1000, settings()).run([])


def test_the_least_choice_takes_no_more_than_any_other(five):
    totals = {choice: five.total(choice) for choice in product(OPTIONS, repeat=5) if any(choice)}
    assert five.total(five.least) == min(totals.values())
    kept = replace(five, options=(4, 8, 16))
    assert kept.least == (4,) * 5


def test_choices_are_kept_apart_from_sets_and_found_again(tmp_path, monkeypatch):
    """Two tables; nothing is measured twice; other rounded layers make other measurements."""
    asked = []

    def in_units(pool, method, units, arguments, label):
        for unit in units:
            _, samples, sets, *_ = arguments(unit)
            asked.append(sets)
            rows = [
                {"sample_id": s.id, pool: list(one), "kl": float(sum(one)), "nll": 1.0, "tokens": 2}
                for s in samples
                for one in sets
            ]
            yield unit, SimpleNamespace(error=None, value=rows)

    monkeypatch.setattr(measurements, "in_units", in_units)
    run = run_with(tmp_path)
    monkeypatch.setattr(run, "facts", lambda stage, kind=None: {"layers": 3})
    model, data, rounded, other = (Stage(kind, 1, {}, (), lambda *_: None) for kind in ("m", "data", "r", "o"))
    samples = [Conversation("one", "one.png", "What?", "This.")]

    def choices(stage) -> ChoiceMeasurements:
        return ChoiceMeasurements(run, "choice", model, data, samples, stage)

    sets = Measurements(run, "removed", model, data, samples)
    assert sets.losses("kl", [(2, 1)]).means_K == [3]
    assert choices(rounded).losses("kl", [(2, 1, 0), (4, 16, 16)]).means_K.tolist() == [3, 36]
    assert asked == [[(1, 2)], [(2, 1, 0), (4, 16, 16)]]
    assert choices(rounded).losses("kl", [(4, 16, 16)]).means_K == [36]
    assert len(asked) == 2
    choices(other).losses("kl", [(4, 16, 16)])
    assert len(asked) == 3
