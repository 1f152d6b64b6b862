"""Width pruning from the config to the report: with depth and without, recovered, rounded, counted, refused."""

import pytest
from transformers import AutoConfig

from actors.estimate import Setting, architecture
from actors.estimate import estimate as size_of
from actors.narrowing.narrower import narrow_config
from jobs import compress, evaluate, joint, prepare, prune, quantize, recover, report
from jobs.core.facts import EvaluateFacts, NarrowFacts
from tests.jobs.here import run_here

OPTIONS = {
    "data__draw_per_class": 2,
    "prune__layers": 2,
    "prune__order": "[4, 5]",
    "prune__width": 0.5,
    "recover__train": "lora",
    "recover__objective": "sft+hidden",
    "recover__batch": 8,
    "quantize__method": "rtn",
    "quantize__group_size": 32,
    "ablate__compare": "[]",
    "evaluate__limit": 2,
    "evaluate__controls": "false",
    "evaluate__timed_runs": 1,
    "evaluate__timed_tokens": 2,
    "generation__max_new_tokens": 8,
}


@pytest.fixture
def start(monkeypatch, tmp_path):
    def run(**options):
        return run_here(monkeypatch, tmp_path / "run", config="configs/derm-tiny.yaml", **{**OPTIONS, **options})

    return run


def test_depth_and_width_in_one_pipeline(start, capsys):
    """Six rows and a report; the narrow checkpoint is recovered, rounded and evaluated as any other."""
    run = start()
    planned = compress.plan(run)
    compress.job(run)
    narrow = planned["prune"][0]
    facts = run.facts(narrow, NarrowFacts)
    config = AutoConfig.from_pretrained(run.folder_of(narrow)).text_config
    assert (config.num_hidden_layers, config.num_key_value_heads) == (8, facts["head_groups"])
    assert config.intermediate_size == facts["channels"] and facts["channels"] % 32 == 0
    whole = run.base_config().text_config
    assert facts["channels"] == whole.intermediate_size // 2 // 32 * 32
    assert prune.removed_layers(run, narrow) == [4, 5]
    rows = {row["method"]: row for row in compress.make_summary(run, planned)}
    assert rows["prune"]["removed_layers"] == [4, 5] and rows["prune"]["params"] < 0.75 * rows["original"]["params"]
    assert rows["prune+sft"]["params"] == rows["prune"]["params"]
    card = (run.folder_of(planned["prune+sft+quant"][0]) / "README.md").read_text()
    assert "**Pruned.**" in card and "**Narrowed.** Every layer keeps" in card and "**Fine-tuned.**" in card
    report.job(run)
    text = (run.folder / report.MARKDOWN).read_text()
    assert "share of heads and channels kept: 0.5" in text and "4, 5" in text


def test_width_alone_is_what_the_estimate_counts(start):
    run = start(prune__layers=0, prune__order="null", prune__width_criterion="magnitude")
    narrow = prune.stage(run, run.base_model())
    assert narrow.kind == "narrow" and prune.removed_layers(run, narrow) == []
    assert compress.scores_stage(run) is None
    evaluated = evaluate.stage(run, narrow, prepare.stage(run))
    run.make(evaluated)
    counted = run.facts(evaluated, EvaluateFacts)["profile"]["params"]
    shapes = architecture(narrow_config(run.base_config(), 0.5, 32))
    setting = Setting((16,) * 10, "none", 32, 1, 1, None, 8, 4, 1)
    assert counted == size_of(shapes, setting)["params"]


def test_what_width_cannot_be_joined_with(start):
    with pytest.raises(ValueError, match=r"jobs\.joint chooses layers and bits of a model of full width"):
        joint.job(start(joint__budget_gib=1.0))
    run = start(recover__train="patch")
    with pytest.raises(ValueError, match="patch works at full width only"):
        recover.stage(run, prune.stage(run, run.base_model()), prepare.stage(run))
    run = start(quantize__group_size=128)
    narrow = prune.stage(run, run.base_model())
    with pytest.raises(ValueError, match=r"a prune\.width that leaves a multiple"):
        run.make(quantize.stage(run, narrow, prepare.stage(run)))
    run = start(quantize__group_size=1024)
    with pytest.raises(ValueError, match=r"the model has \d+: choose a smaller group_size"):
        prune.stage(run, run.base_model())
    with pytest.raises(ValueError, match="works at full width only"):
        start(search__widths="[1.0, 0.5]", search__recoveries="[patch+lora]")
    for width in (0, 1.5):
        with pytest.raises(ValueError, match=r"prune\.width"):
            start(prune__width=width)
