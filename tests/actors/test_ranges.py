"""Activation ranges: summarised by hand-made numbers, and the planted outlier channels of derm-tiny are found."""

import numpy as np
import pytest
import torch

from actors.checkpoint.loading import language_model, load_processor
from actors.derm_tiny.train import plant_outliers
from actors.maths.ranges import range_facts
from actors.ranges import RangeRecorder
from actors.specs import ModelSpec
from tests.tiny import DERM_TINY, LAYERS, draw_conversations, tiny_model

QKV, GATE_UP = "q_proj, k_proj, v_proj", "gate_proj, up_proj"


def test_facts_by_hand():
    """A median of 2; 40 is just 20 times as much and no outlier, 41 and 100 are."""
    found = range_facts(np.array([2, 100, 1, 2, 3, 40, 41, 1, 2], dtype=np.float32))
    assert (found["channels"], found["median"], found["max"], found["outliers"]) == (9, 2, 100, 2)
    assert found["channel_ids"] == [1, 6] and found["ratios"] == [50, 20.5]
    assert found["p99"] == pytest.approx(41 + 0.92 * 59)


def test_equal_channels_have_no_outliers():
    found = range_facts(np.full(8, 3, dtype=np.float32))
    assert (found["outliers"], found["channel_ids"], found["median"], found["p99"]) == (0, [], 3, 3)


@pytest.fixture(scope="module")
def planted(tmp_path_factory, lesions):
    """A tiny model's ranges before and after outliers are planted, and which channels they are."""
    folder, rows, sizes = tmp_path_factory.mktemp("planted"), [], []
    for name in ("plain", "planted"):
        model = tiny_model("clip-llama")
        if name == "planted":
            plant_outliers(model, share=0.05, factor=500.0, seed=3)
        sizes.append([_sizes(layer) for layer in language_model(model).layers])
        model.save_pretrained(folder / name)
        load_processor(str(DERM_TINY)).save_pretrained(folder / name)
        recorder = RangeRecorder(ModelSpec(str(folder / name)), 64)
        rows.append({(r["layer"], r["projections"]): r for r in recorder.ranges(draw_conversations(lesions, 3))})
    channels = {
        (number, projections): {int(i) for i in (after[projections] / before[projections] > 100).nonzero()}
        for number, (before, after) in enumerate(zip(*sizes, strict=True))
        for projections in after
    }
    return rows, channels


def _sizes(layer) -> dict[str, torch.Tensor]:
    return {
        QKV: layer.input_layernorm.weight.detach().abs(),
        GATE_UP: layer.post_attention_layernorm.weight.detach().abs(),
        "down_proj": layer.mlp.up_proj.weight.detach().norm(dim=1),
    }


def test_every_input_of_every_layer_has_a_row(planted):
    (plain, _), _ = planted
    assert set(plain) == {(n, p) for n in range(LAYERS) for p in (QKV, "o_proj", GATE_UP, "down_proj")}
    assert {plain[0, p]["channels"] for p in (QKV, "o_proj", GATE_UP)} == {64} and plain[0, "down_proj"][
        "channels"
    ] == 128
    assert all(0 < row["median"] <= row["p99"] <= row["max"] for row in plain.values())


def test_planted_channels_are_the_outliers(planted):
    """Exactly the planted ones are named, by all inputs they were planted in; o_proj's input has none."""
    (plain, found), channels = planted
    assert all(row["outliers"] == 0 for row in plain.values())
    for key, expected in channels.items():
        assert len(expected) in (3, 6) and set(found[key]["channel_ids"]) == expected, key
    assert all(found[n, "o_proj"]["outliers"] == 0 for n in range(LAYERS))


def test_maxima_are_those_of_the_model(lesions):
    """Against every layer's own input norm, on the same conversations, one after the other."""
    recorder = RangeRecorder(ModelSpec(str(DERM_TINY)), 64)
    conversations = draw_conversations(lesions, 2)
    both = {(r["layer"], r["projections"]): r for r in recorder.ranges(conversations)}
    alone = [{(r["layer"], r["projections"]): r for r in recorder.ranges([c])} for c in conversations]
    assert len(both) == 40 and not any(m._forward_pre_hooks for m in recorder.replica.model.modules())
    for key, row in both.items():
        assert row["max"] == max(each[key]["max"] for each in alone)


def test_derm_tiny_has_its_planted_outliers(lesions):
    """In every layer, the inputs that the norms and up_proj scale up have outliers: channels that were planted."""
    recorder = RangeRecorder(ModelSpec(str(DERM_TINY)), 64)
    rows = {(r["layer"], r["projections"]): r for r in recorder.ranges(draw_conversations(lesions, 8))}
    for number, layer in enumerate(language_model(recorder.replica.model).layers):
        for projections, size in _sizes(layer).items():
            row = rows[number, projections]
            largest = set(size.topk(round(0.15 * len(size))).indices.tolist())
            assert row["outliers"] > 0 and set(row["channel_ids"]) <= largest, (number, projections, row)
        assert rows[number, "o_proj"]["outliers"] == 0
