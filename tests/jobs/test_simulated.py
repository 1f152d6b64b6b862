"""Simulated rounding in rows, tables and figures: it looks like what it stands for, and says what is stored."""

from types import SimpleNamespace

import pytest

from jobs import compress, report
from jobs.core.options import load_config
from jobs.core.stage import Source, Stage
from jobs.figures.layers import tradeoff_figure
from jobs.ranking.ranges import largest_outliers

MIB = 2**20
PROFILE = {"stored_bits": 16, "weight_bytes": 16 * MIB}
FACTS = {
    "simulated": {"simulated": True, "bits_per_weight": 3.297, "nominal_bytes": 5 * MIB, "linears": 35},
    "packed": {"simulated": False, "bits_per_weight": 4.3125, "nominal_bytes": 6 * MIB, "linears": 35},
}
COMMON = {
    **{"params": 8_000_000, "peak_memory_bytes": MIB, "ms_per_token": 1.0, "ms_per_token_p5_p95": [1.0, 1.0]},
    **{"baseline_pct": 90.0, "baseline_interval_pct": [80.0, 95.0], "exact_pct": 50.0, "name_accuracy": None},
    **{"difference_pct": 0.0, "difference_interval_pct": [-1.0, 1.0], "name_accuracy_interval": None},
    **{"images": 4, "answers": 8, "unanswered": 0, "device": "CPU", "threads": 1, "is_llm_judge": False},
    "judge_failure": None,
    "difference_finding": "unresolved",
}


def row(kind: str, method: str = "quant") -> dict:
    """A row of the summary; kind: "original", or a quantized checkpoint of FACTS, by rtn."""
    bits = {"simulated": "3", "packed": "4"}.get(kind, "4")
    config = load_config(None, [("quantize.method", "rtn"), ("quantize.bits", bits)])
    run = SimpleNamespace(config=config, facts=lambda stage, kind=None: FACTS[stage.settings["kind"]])
    profile, model = PROFILE, Source("model", "path")
    if kind != "original":
        model = Stage("quantize", 3, {"kind": kind}, (), lambda *_: None)
        stored = {"simulated": 16 * MIB, "packed": 6 * MIB}
        profile = {"stored_bits": 16, "weight_bytes": stored[kind]}
    quantizer = "none" if kind == "original" else "rtn"
    known = {"method": method, "quantizer": quantizer, "weight_bytes": profile["weight_bytes"]}
    return {**COMMON, **known, **compress._bits(run, model, profile)}


def test_rows_by_hand():
    known = ("bits", "simulated", "bits_per_weight", "nominal_bytes")
    assert [row("original")[key] for key in known] == [16, False, 16.0, 16 * MIB]
    assert [row("packed")[key] for key in known] == [4, False, 4.3125, 6 * MIB]
    assert [row("simulated")[key] for key in known] == [3, True, 3.297, 5 * MIB]


def test_the_terminal_marks_what_is_simulated():
    text = compress.format_rows([row("original", "original"), row("simulated")])
    assert "16.00 MiB " in text and "5.00 MiB*" in text and "* simulated: the size at 3 bits" in text
    assert "*" not in compress.format_rows([row("original", "original"), row("packed")])


@pytest.mark.parametrize(
    ("kind", "bits", "weights"),
    [
        ("original", "16", "16.00 MiB"),
        ("packed", "4", "6.00 MiB"),
        ("simulated", "3 (simulated)", "5.00 MiB (16.00 MiB stored)"),
    ],
)
def test_the_report_tells_both_sizes(kind, bits, weights):
    shown = report.format_row(row(kind))
    assert (shown["bits_text"], shown["weights_text"]) == (bits, weights)


def test_the_report_tells_how_it_was_rounded():
    config = load_config(None, [("quantize.method", "rtn"), ("quantize.bits", "3")])
    said = report._quantizer(SimpleNamespace(config=config), row("simulated"))
    assert said == "rtn, 3 bits (3.30 with scales), groups of 64; simulated: stored in 16 bits"
    none = load_config(None, [("quantize.method", "none")])
    assert report._quantizer(SimpleNamespace(config=none), row("original")) == "none"


def test_only_simulated_points_are_hollow():
    def hollow(*rows: dict) -> int:
        return tradeoff_figure(list(rows)).count("fill: #ffffff; stroke: #c05621")

    assert hollow(row("original", "original"), row("packed")) == 0
    assert hollow(row("original", "original"), row("simulated")) > 0


def test_the_largest_outliers_of_all_layers_by_hand():
    rows = [
        {"layer": 0, "projections": "down_proj", "channel_ids": [7, 2], "ratios": [90.0, 30.0]},
        {"layer": 1, "projections": "o_proj", "channel_ids": [], "ratios": []},
        {"layer": 2, "projections": "o_proj", "channel_ids": list(range(10)), "ratios": [60.0 - i for i in range(10)]},
    ]
    found = [(one["layer"], one["projections"], one["channel"], one["ratio"]) for one in largest_outliers(rows)]
    assert found[:2] == [(0, "down_proj", 7, 90.0), (2, "o_proj", 0, 60.0)] and len(found) == 10
    assert (0, "down_proj", 2, 30.0) not in found


def test_the_report_says_whose_weights_are_unpacked():
    """At the row itself: smaller weights than the original's, and more memory."""
    original = row("original")
    assert report.format_row(row("packed"), original)["peak_text"] == "1.00 MiB"
    unpacked = row("packed") | {"peak_memory_bytes": 2 * MIB}
    assert report.format_row(unpacked, original)["peak_text"] == "2.00 MiB (weights unpacked)"
