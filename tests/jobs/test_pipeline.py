"""The pipeline as a user runs it, on a few drawn images, with a private Ray; then its report."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.tables import read_table
from tests.jobs.commands import ROOT, assert_says, options, run

# The first test waits for the whole pipeline. tests/jobs/test_extensions.py goes the same way in one process.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1000)]
REQUIRED = {
    *("method", "removed_layers", "bits", "quantizer", "params", "weight_bytes", "baseline_pct", "name_accuracy"),
    *("ms_per_token", "is_llm_judge", "judge_pct", "bits_per_weight", "simulated", "nominal_bytes"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    result = run("compress", *options(folder))
    assert result.returncode == 0, result.stderr
    return folder, result.stdout + result.stderr


def test_summary_has_the_six_rows(finished):
    rows = json.loads((finished[0] / "summary.json").read_text())
    methods = ["original", "prune", "prune+sft", "quant", "prune+quant", "prune+sft+quant"]
    assert [row["method"] for row in rows] == methods
    assert all(set(row) >= REQUIRED for row in rows)
    assert all(row["is_llm_judge"] is False and row["judge_pct"] is None for row in rows)
    by = {row["method"]: row for row in rows}
    assert len(by["prune"]["removed_layers"]) == 2 and by["quant"]["removed_layers"] == []
    assert by["prune"]["params"] < by["original"]["params"] == by["quant"]["params"]
    assert by["quant"]["weight_bytes"] < by["original"]["weight_bytes"]
    assert (by["quant"]["bits"], by["quant"]["quantizer"]) == (4, "awq")
    assert (by["original"]["bits"], by["original"]["quantizer"]) == (16, "none")
    assert not any(row["simulated"] for row in rows) and 4 < by["quant"]["bits_per_weight"] < 5
    assert all(row["nominal_bytes"] == row["weight_bytes"] for row in rows)
    assert by["original"]["name_accuracy"] >= 70
    assert all(row["ms_per_token"] > 0 for row in rows)


def test_the_resolved_config_is_kept(finished):
    from jobs.core.options import load_config

    kept = load_config(str(finished[0] / "config.compress.yaml"), [])
    assert kept.prune.layers == 2 and kept.run_dir == str(finished[0])


def test_ablation_rows_are_complete_and_explain_the_removal(finished):
    (folder,) = (finished[0] / "artifacts").glob("ablate-*")
    scores = read_table(folder / "scores.parquet")
    facts = json.loads((folder / "manifest.json").read_text())
    assert 0 in facts["outliers"], "without its first layer derm-tiny says nothing"
    assert [row["layer"] for row in scores] == sorted(set(range(10)) - set(facts["outliers"]))
    assert all(-1 <= row["low"] <= row["score"] <= row["high"] <= 1 and row["samples"] == 8 for row in scores)
    best = sorted(scores, key=lambda row: (-row["score"], row["layer"]))
    assert facts["order"] == [row["layer"] for row in best]
    assert [row["rank"] for row in best] == list(range(1, len(best) + 1))
    removed = json.loads((finished[0] / "summary.json").read_text())[1]["removed_layers"]
    assert removed == sorted(facts["order"][:2])
    assert (folder / "importance.svg").read_text().startswith("<svg")


def test_the_activation_ranges_name_the_planted_outliers(finished):
    (folder,) = (finished[0] / "artifacts").glob("ranges-*")
    rows = read_table(folder / "ranges.parquet")
    assert len(rows) == 40 and (folder / "ranges.svg").read_text().startswith("<svg")
    largest = json.loads((folder / "manifest.json").read_text())["largest_outliers"]
    assert len(largest) == 10 and all(one["ratio"] > 20 and one["projections"] != "o_proj" for one in largest)
    assert run("report", *options(finished[0])).returncode == 0
    first = largest[0]
    twin = (finished[0] / "report.md").read_text()
    assert f"| {first['layer']} | {first['projections']} | {first['channel']} | {first['ratio']:.0f} |" in twin


def test_every_measurement_is_kept_once(finished):
    folder = finished[0] / "measurements"
    kinds = {path.name.rpartition("-")[0]: path for path in folder.iterdir()}
    assert {"answers", "reference", "influence", "magnitude"} <= set(kinds)
    for path in kinds.values():
        keys = [(r["sample_id"], tuple(r["removed"])) for f in path.glob("*.parquet") for r in read_table(f)]
        assert len(keys) == len(set(keys)) > 0


@pytest.mark.parametrize("search", ["greedy", "evolution"])
def test_a_search_over_sets_beats_or_equals_one_shot_on_its_own_questions(finished, search):
    changes = {"prune.search": search, "prune.layers": "3", "prune.generations": "2", "ablate.candidates": "all"}
    result = run("prune", *options(finished[0], **changes))
    assert result.returncode == 0, result.stderr
    manifests = [json.loads(path.read_text()) for path in finished[0].glob("artifacts/select-*/manifest.json")]
    chosen = {"search": search, "layers": 3}
    (facts,) = [facts for facts in manifests if chosen.items() <= facts["recipe"]["settings"].items()]
    assert len(facts["removed"]) == 3 and facts["sets_measured"] > 3
    assert facts["gain"] >= 0 and facts["score"] >= facts["one_shot_score"]
    assert str(facts["removed"]) in result.stderr


def test_the_result_loads_elsewhere(finished):
    rows = json.loads((finished[0] / "summary.json").read_text())
    code = (
        "import sys; from transformers import AutoModelForImageTextToText as M, AutoProcessor as P\n"
        "model, info = M.from_pretrained(sys.argv[1], output_loading_info=True)\n"
        "assert not any(info[k] for k in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), info\n"
        "P.from_pretrained(sys.argv[1]); print('layers', model.config.text_config.num_hidden_layers)"
    )
    for row in rows:
        if row["method"] in ("prune", "prune+sft"):
            done = subprocess.run(
                [sys.executable, "-c", code, row["checkpoint"]], capture_output=True, text=True, cwd="/"
            )
            assert done.returncode == 0, done.stderr
            assert done.stdout.strip().endswith("layers 8")


def test_every_checkpoint_has_passed_the_gate_and_has_a_card_with_its_scores(finished):
    for row in json.loads((finished[0] / "summary.json").read_text())[1:]:
        folder = Path(row["checkpoint"])
        facts, card = json.loads((folder / "manifest.json").read_text()), (folder / "README.md").read_text()
        assert f"{row['baseline_pct']:.1f} [" in card and f"On {row['images']} held-out images" in card
        layers = ", ".join(map(str, row["removed_layers"]))
        assert (f"Decoder layers {layers} were removed" in card) == bool(layers)
        assert ("**Fine-tuned.**" in card) == ("sft" in row["method"])
        assert ("**Quantized** by awq" in card) == ("quant" in row["method"])
        assert ("Calibrated with 8 training conversations" in card) == ("quant" in row["method"])
        assert facts["gate"]["names"] == "as published by llava-hf" and len(facts["gate"]["sums"]) > 100
        assert "python -m jobs.compress --config configs/derm-tiny.yaml" in card and str(finished[0]) not in card


def test_a_second_run_computes_nothing(finished):
    again = run("compress", *options(finished[0]))
    assert again.returncode == 0
    assert "computing" in finished[1] and "computing" not in again.stderr


def test_a_judge_joins_a_finished_pipeline(finished, tmp_path):
    """Only judging is left to do; a random judge is found out; the report says so, and needs the verdicts."""
    from tests.judging import save_tiny_judge

    small = {"engine": "transformers", "model": save_tiny_judge(tmp_path), "dtype": "float32", "gpus": 0, "controls": 2}
    judge = options(finished[0], **{f"judge.{key}": str(value) for key, value in small.items()})
    assert_says(run("report", *judge), "Nothing to report", "judge")
    result = run("compress", *judge)
    assert result.returncode == 0, result.stderr
    assert re.findall(r"(\w+): computing", result.stderr) == ["judge"] * 6
    assert "judge %" in result.stdout and "FLAGGED" in result.stdout and "uncalibrated" in result.stdout
    rows = json.loads((finished[0] / "summary.json").read_text())
    assert all(row["is_llm_judge"] and row["judge_flagged"] and not row["judge_calibrated"] for row in rows)
    assert all(row["judge_total"] == row["answers"] for row in rows)
    assert run("report", *judge).returncode == 0
    assert "FLAGGED" in (finished[0] / "report.html").read_text().upper()
    again = run("compress", *judge)
    assert again.returncode == 0 and "computing" not in again.stderr and "different answers" not in again.stderr
    assert run("compress", *options(finished[0])).returncode == 0  # other tests read a summary without a judge


def test_another_quantizer_reuses_the_rest(finished):
    result = run("compress", *options(finished[0], **{"quantize.method": "rtn"}))
    assert result.returncode == 0, result.stderr
    computed = re.findall(r"(\w+): computing", result.stderr)
    assert sorted(computed) == ["evaluate"] * 3 + ["quantize"] * 3


def test_the_report_stands_alone(finished):
    folder = finished[0]
    assert run("report", *options(folder)).returncode == 0
    page = (folder / "report.html").read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", page)
    assert "LLM judge: not run" in page and "Not for clinical use" in page
    rows = json.loads((folder / "summary.json").read_text())
    twin = (folder / "report.md").read_text()
    for row in rows:
        assert f'<th scope="row">{row["method"]}</th>' in page
        assert f"{row['baseline_pct']:.1f}" in page and f"{row['baseline_pct']:.1f}" in twin
    assert "pairs of layers differ" in page and "Kendall" in page
    assert page.count("<svg") == 4 and page.count('<article class="sample">') >= 3
    assert "data:image/jpeg;base64," in page


def test_the_original_looks_and_is_what_the_others_are_measured_by(finished):
    rows = json.loads((finished[0] / "summary.json").read_text())
    for row in rows:
        controls = read_table(finished[0] / "artifacts" / row["evaluation"] / "controls.parquet")
        assert len(controls) == 2 * row["answers"] == 2 * row["controls"]["blank"]["answers"]
        assert {one["control"] for one in controls} == {"blank", "swapped"}
        assert set(row["retention"]) == {"baseline", "exact", "name_accuracy", "macro_f1", "stopped", "without_loop"}
    original = rows[0]
    assert all(kept["pct"] == 100 for kept in original["retention"].values())
    assert original["controls"]["swapped"]["name_fall_interval_pct"][0] > 30
    assert original["controls"]["blank"]["baseline_fall_interval_pct"][0] > 20
    blank = [one for one in controls if one["control"] == "blank"]
    assert len({one["answer"] for one in blank}) <= len({one["question"] for one in blank}) == 3
    assert rows[1]["retention"]["exact"]["pct"] < 100 and 0 < original["macro_f1_pct"] <= 100


def test_single_jobs_take_a_path(finished):
    folder = finished[0]
    pruned = json.loads((folder / "summary.json").read_text())[1]
    result = run("evaluate", *options(folder, **{"model.path": pruned["checkpoint"]}))
    assert result.returncode == 0 and f"{pruned['evaluation']} exists, reused" in result.stderr


def test_candidate_layer_out_of_range(finished):
    result = run("ablate", *options(finished[0], **{"ablate.candidates": "[2, 42]"}))
    assert_says(result, "layer 42", "0 to 9")


def test_removing_more_layers_than_may_go(finished):
    assert_says(run("prune", *options(finished[0], **{"prune.layers": "10"})), "prune.layers is 10", "only")


def test_an_order_with_a_layer_that_is_not_there(finished):
    result = run("prune", *options(finished[0], **{"prune.order": "[3, 10]"}))
    assert_says(result, "layer 10", "0 to 9")


def test_a_checkpoint_with_nan(finished, tmp_path):
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(ROOT / "actors" / "derm_tiny" / "checkpoint", broken)
    tensors = load_file(broken / "model.safetensors")
    name = "language_model.model.layers.4.mlp.up_proj.weight"
    tensors[name][0, 0] = torch.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    result = run("evaluate", *options(finished[0], **{"model.path": str(broken)}))
    assert_says(result, str(broken), "NaN", "layers.4.mlp.up_proj")
