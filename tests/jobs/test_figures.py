"""The figures' colours on a white page: graphics have a contrast of 3:1 (WCAG 2.2, 1.4.11), text of 4.5:1 (1.4.3)."""

import re
import xml.etree.ElementTree as ET

import pytest

from jobs.figures.layers import importance_figure, loss_figure, ranges_figure, tradeoff_figure
from jobs.figures.search import _SHADES, Mark, front_figure, layers_figure

COLOUR = re.compile(r"(?:fill|stroke): (#[0-9a-f]{6})")


def contrast(one: str, other: str) -> float:
    """Return the contrast of two colours such as #2b6cb0 (WCAG 2.2, relative luminance and contrast ratio)."""

    def light(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    darker, lighter = sorted((light(one), light(other)))
    return (lighter + 0.05) / (darker + 0.05)


def drawn() -> dict[str, str]:
    """Every kind of figure that draws on white, with all its colours."""
    marks = [Mark(1, 1.0, 90.0, 80.0, 95.0, "none", True), Mark(2, 2.0, 70.0, 60.0, 75.0, "rtn", False)]
    scores = [{"layer": layer, "score": 0.8, "low": 0.7, "high": 0.9} for layer in (1, 2)]
    ranges = [{"projections": "q_proj", "layer": layer, "max": 9, "p99": 5, "median": 1} for layer in (0, 1)]
    row = {"baseline_interval_pct": [80, 95], "baseline_pct": 90, "nominal_bytes": 2**20, "simulated": False}
    rows = [{**row, "method": one, "quantizer": one} for one in ("none", "rtn")]
    return {
        "importance": importance_figure(scores, removed=(2,)),
        "ranges": ranges_figure(ranges),
        "loss": loss_figure([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]),
        "tradeoff": tradeoff_figure(rows),
        "front": front_figure(marks, "memory (GiB)", "score (%)", 1.5, [(4.0, 60.0)], "GB"),
    }


def test_contrast_is_that_of_the_standard():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.005)  # the lightest grey that text may have
    assert contrast("#ff0000", "#ffffff") == contrast("#ffffff", "#ff0000") == pytest.approx(4.0, abs=0.005)


def test_marks_and_text_stand_out_from_the_page():
    for name, figure in drawn().items():
        colours = set(COLOUR.findall(figure)) - {"#ffffff"}
        assert colours and [colour for colour in colours if contrast(colour, "#ffffff") < 3] == [], name
        texts = [e for e in ET.fromstring(figure).iter() if e.tag.endswith("}text")]
        written = {colour for text in texts for colour in COLOUR.findall(text.get("style", ""))}
        assert texts and [colour for colour in written if contrast(colour, "#ffffff") < 4.5] == [], name


def test_bits_can_be_read_on_their_shades():
    figure = layers_figure([("a", list(_SHADES))])
    texts = [e for e in ET.fromstring(figure).iter() if e.tag.endswith("}text")]
    styled = {e.text: COLOUR.findall(e.get("style", "")) for e in texts if COLOUR.search(e.get("style", ""))}
    assert list(styled) == ["–", "3", "4", "8", "16"]  # the ticks' own numbers have no colour
    assert [bits for bits, shade in zip(styled, _SHADES.values(), strict=True)
            if contrast(*styled[bits], shade) < 4.5] == []  # fmt: skip


def test_labels_stay_inside_the_picture():
    """Six methods whose intervals reach 100 %, some at one size: every name is in the picture, as wide as it is."""
    names = ("original", "prune", "prune+sft", "quant", "prune+quant", "prune+sft+quant")
    sizes = (200, 160, 160, 60, 50, 50)
    rows = [
        {"method": name, "nominal_bytes": size * 2**20, "quantizer": "none", "simulated": False}
        | {"baseline_pct": 99.0 - number / 5, "baseline_interval_pct": [97.0, 100.0]}
        for number, (name, size) in enumerate(zip(names, sizes, strict=True))
    ]
    root = ET.fromstring(tradeoff_figure(rows))
    _, _, width, height = map(float, root.get("viewBox").split())
    places = {}
    for text in root.iter("{http://www.w3.org/2000/svg}text"):
        if text.text in names:
            places[text.text] = float(text.get("x")), float(text.get("y"))
    assert places.keys() == set(names)
    for name, (x, y) in places.items():
        assert 0 <= x <= width and 9 <= y <= height, (name, x, y)
