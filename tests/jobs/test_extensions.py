"""A quantizer and a criterion that only this file knows: one table entry each, and every job takes them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from actors.checkpoint.tensors import iterate_tensors
from actors.criteria import CRITERIA, Criterion
from actors.critic import MEASURES
from actors.estimate import Setting, estimate
from actors.gate.check import ROUNDED
from actors.gate.linears import ROUNDED_LINEAR
from actors.quantizers.storage import write_rounded
from actors.quantizers.table import METHODS, SIMULATED, Layout, Method, for_bits, known_bits
from cluster.tables import read_table
from jobs import ablate, compress, report
from jobs.core.facts import FACTS, Facts, Metrics, Profile
from jobs.core.options import fields, load_config
from jobs.core.rows import check_rows
from jobs.searching.space import space
from tests.gating import check
from tests.jobs.commands import CONFIG, SMALL
from tests.jobs.here import run_here
from tests.quantizing import quantize
from tests.tiny import DERM_TINY, llava_7b

TOY = Method(
    words="a scale a row, nothing clever",
    function=f"{__name__}:quantize_toy",
    bits=(8,),
    layout=Layout(
        name="toy",
        linear_bytes=lambda bits, group, outputs, inputs: outputs * inputs + 2 * outputs,
    ),
    marker="x",
    slopes={8: (0.005, 0.1)},
)
NEW_BITS = next(bits for bits in range(5, 16) if bits not in known_bits())
NEW = Method(
    words="round to nearest with bits that no other method has",
    function="actors.quantizers.rtn:quantize_rtn",
    bits=(NEW_BITS,),
    layout=Layout(name="new", linear_bytes=lambda bits, group, outputs, inputs: outputs * inputs * bits // 8),
    marker="1",
    groups=8,
)
WRONG = 1.2  # what a quantizer multiplies the scales by that the gate must refuse


def quantize_toy(source: Path, config, settings, out: Path, factor: float = 1.0) -> None:
    def parts(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        scale = weight.abs().amax(1, keepdim=True) / 127
        return {"weight": (factor * scale * (weight / scale).round()).to(torch.float16)}

    setattr(config, SIMULATED, {"method": "toy", "bits": settings.bits})
    write_rounded(source, out, config, torch.float16, iterate_tensors(source), parts)


def quantize_wrongly(source: Path, config, settings, out: Path) -> None:
    quantize_toy(source, config, settings, out, WRONG)


def middle(critic, samples, sets, base, known) -> list[dict]:
    """The measure of a criterion that would first remove the layers next to layer 4."""
    return [
        {"sample_id": sample.id, "removed": list(removed), "distance": float(sum(abs(layer - 4) for layer in removed))}
        for sample in samples
        for removed in sets
    ]


@pytest.fixture
def toys(monkeypatch):
    monkeypatch.setitem(METHODS, "toy", TOY)
    monkeypatch.setitem(MEASURES, "middle", middle)
    monkeypatch.setitem(CRITERIA, "middle", Criterion("middle", "distance", None, "distance from layer 4"))


def toy_run(monkeypatch, folder: Path, **options):
    changes = {
        **SMALL,
        **{"quantize.method": "toy", "ablate.criterion": "middle", "ablate.candidates": "all"},
        **{"data.draw_per_class": "2", "ablate.samples": "2", "recover.epochs": "0.1", "evaluate.controls": "false"},
        **{"ablate.compare": "[magnitude+]", "evaluate.limit": "2"},
    }
    return run_here(monkeypatch, folder, DERM_TINY, config=CONFIG, **changes, **options)


def test_from_pruning_to_the_report(toys, monkeypatch, tmp_path):
    run = toy_run(monkeypatch, tmp_path)
    compress.job(run)
    planned = compress.plan(run)
    removed = run.facts(planned["prune"][0])["removed"]
    assert sorted(removed) == [3, 4]
    scores = read_table(run.store.root / compress.scores_stage(run).name / ablate.SCORES)
    assert {row["layer"]: row["loss"] for row in scores} == {layer: abs(layer - 4) for layer in range(10)}
    facts = run.facts(planned["prune+sft+quant"][0])
    assert facts["simulated"] and facts["linears"] == 8 * 7
    assert "the weight before rounding, linear by linear" in facts["gate"]["linears"]
    row = compress.make_summary(run, planned)[-1]
    assert (row["quantizer"], row["bits"], row["simulated"]) == ("toy", 8, True)
    for path in (tmp_path / "artifacts").glob("*/manifest.json"):
        noted = json.loads(path.read_text())
        check_rows([noted], FACTS.get(noted["recipe"]["kind"], Facts))
        if noted["recipe"]["kind"] == "evaluate":
            check_rows([noted["metrics"]], Metrics)
            check_rows([noted["profile"]], Profile)
    report.job(run)
    page = (tmp_path / report.MARKDOWN).read_text()
    assert "toy, 8 bits" in page and "distance from layer 4" in page and "groups of" not in page


def test_the_gate_refuses_what_it_rounds_wrongly(toys, monkeypatch, tmp_path):
    monkeypatch.setitem(METHODS, "toy", replace(TOY, function=f"{__name__}:quantize_wrongly"))
    run = toy_run(monkeypatch, tmp_path)
    with pytest.raises(RuntimeError, match=r"its scales are off\. Its weights are 1\.2 times as large"):
        run.make(compress.plan(run)["quant"][0])


def test_bits_that_no_other_method_has(monkeypatch, tmp_path):
    """The options take them, and the gate bounds them as the next fewer bits."""
    with pytest.raises(ValueError, match=rf"'quantize\.bits': Input should be 2, .* or 16 \(given: {NEW_BITS}\)"):
        load_config(None, [("quantize.bits", str(NEW_BITS))])
    monkeypatch.setitem(METHODS, "new", NEW)
    assert load_config(None, [("quantize.method", "new")]).quantize.bits == NEW_BITS
    facts = quantize(str(DERM_TINY), tmp_path / "a", "new")
    assert facts["simulated"] and facts["bits_per_weight"] == NEW_BITS
    found = check(tmp_path / "a", DERM_TINY)
    assert f"(allowed: {for_bits(ROUNDED_LINEAR, NEW_BITS):g})" in found["linears"]
    assert f"(allowed: {for_bits(ROUNDED, NEW_BITS):g})" in found["logits"]


def test_options_search_and_estimate_know_them(toys):
    known = {name: kind for name, kind, *_ in fields()}
    assert known["quantize.method"].endswith(" | toy") and known["ablate.criterion"].endswith(" | middle")
    config = load_config(None, [("quantize.method", "toy"), ("search.quantizers", "[none, toy]")])
    assert config.quantize.bits == 8
    assert {(setting.quantizer, setting.bits) for setting in space(config)} == {("none", 16), ("toy", 8)}
    with pytest.raises(ValueError, match=r"Config key 'ablate\.criterion': .* or 'middle' \(given: 'midle'\)"):
        load_config(None, [("ablate.criterion", "midle")])
    common = {"group_size": 64, "batch": 1, "images": 0, "context": None, "decode_tokens": 8, "dtype_bytes": 2}
    sizes = [
        estimate(llava_7b(), Setting(bits=(bits,) * 32, method=method, devices=1, **common))["weight_bytes"]
        for method, bits in (("none", 16), ("toy", 8))
    ]
    linears = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    rows = 32 * (4 * 4096 + 2 * 11008 + 4096)
    assert sizes[0] - sizes[1] == linears - 2 * rows


def test_they_are_gone_with_their_entries():
    last = list(METHODS)[-1]
    with pytest.raises(ValueError, match=rf"quantize\.method.*'{last}' \(given: 'toy'\)"):
        load_config(None, [("quantize.method", "toy")])
