"""The report's page: what it says of a judge, and that nothing in an answer gets out of its place."""

import json
import re
from html.parser import HTMLParser

import pytest

from jobs.ablate import format_tau
from jobs.core.text import format_score
from jobs.reporting import answers as report_answers
from jobs.reporting.pages import render_page
from tests.jobs.pages import HOSTILE, METHODS, content, page


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("page")


class Tags(HTMLParser):
    """Counts tags, and keeps what the data block holds."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.data: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.tags and self.tags[-1] == ("script", {"type": "application/json", "id": "answers-data"}):
            self.data.append(data)


def test_hostile_answers_stay_text(folder):
    """The page has two scripts, its data and its own; every answer comes out of the data as it went in."""
    text = page(folder, judged=True)
    found = Tags(text)
    assert [one for tag, one in found.tags if tag == "script"] == [
        {"type": "application/json", "id": "answers-data"},
        {},
    ]
    assert [tag for tag, _ in found.tags].count("h1") == [tag for tag, _ in found.tags].count("style") == 1
    assert not any(name.startswith("on") for _, one in found.tags for name in one)
    rows = json.loads("".join(found.data))["rows"]
    said = [one["answers"][METHODS.index("quant")]["answer"] for one in rows if "spot" in one["reference"]]
    assert sorted(said) == sorted(report_answers.shorten(one) for one in HOSTILE)


def test_the_page_loads_nothing(folder):
    text = page(folder)
    assert not re.findall(r"""(?:src|href|action)=["'](?!data:|#)""", text.replace(HOSTILE[1], ""))
    assert "default-src 'none'" in text


def test_each_image_is_embedded_once_for_the_viewer(folder):
    viewer = content(folder)["viewer"]
    assert len(viewer["images"]) == 8 and len(viewer["rows"]) == 24
    assert [one["name"] for one in viewer["images"] if one["thumbnail"] is None] == ["lesion-7.png"]
    assert viewer["without_thumbnail"] == 1
    text = page(folder)
    assert all(text.count(one["thumbnail"]) <= 2 for one in viewer["images"] if one["thumbnail"])  # a sample, and here


def test_thumbnails_stop_at_their_bound(folder):
    paths = [one["image"] for one in content(folder)["samples"]][:3]
    size = len(report_answers.thumbnail(paths[0]))
    found = report_answers.encode_thumbnails(paths, int(1.5 * size))
    assert found[0] and found[1:] == [None, None]


def test_long_answers_are_cut_and_say_so():
    assert report_answers.shorten("a" * 4000) == "a" * 4000
    assert report_answers.shorten("a" * 4001).endswith("(cut: 4,001 characters in all)")


def test_without_a_judge(folder):
    text = page(folder)
    assert "LLM judge: not run." in text and "What the judge says" not in text and "flagged" not in text


@pytest.mark.parametrize("template", ["report.html.j2", "report.md.j2"])
def test_a_judge_that_passes_its_controls(folder, template):
    """prune is wrong about the name and the cause of four images: 8 labels of 1, 16 of 4, 75 %."""
    text = render_page(template, content(folder, judged=True))
    assert "LLM judge: not run" not in text and "uncalibrated" in text and "Tiny/Judge@1" in text
    assert "75.0 [70.0, 80.0]" in text and "24/24" in text and "75.0 to 75.0" in text and "0 of 8" in text
    assert "not to be trusted" not in text
    assert "77.7" in text and "88.0 [80.0, 96.0]" in text  # expected, and retained
    prune = content(folder, judged=True)["judge"]["rows"][1]["judge_given_name"]
    assert prune["right"]["judge_pct"] == 100 > prune["not_right"]["judge_pct"]
    assert all(f"{one['judge_pct']:.1f} [{one['judge_interval_pct'][0]:.1f}, " in text for one in prune.values())


def test_the_markdown_says_which_differences_can_be_seen(folder):
    found = content(folder)
    assert "detect a difference of 6.1 to 9.0 points" in render_page(
        "report.md.j2", {**found, "detectable": "6.1 to 9.0"}
    )
    assert "find a difference" not in render_page("report.md.j2", found)


@pytest.mark.parametrize("template", ["report.html.j2", "report.md.j2"])
def test_a_flagged_judge(folder, template):
    text = render_page(template, content(folder, judged=True, missed=3))
    assert "not to be trusted" in text and "prune: reference 3 of 4" in text and "3 of 8" in text
    assert text.index("not to be trusted") < text.index("75.0 [70.0, 80.0] !")


@pytest.mark.parametrize("template", ["report.html.j2", "report.md.j2"])
def test_no_headline_above_two_percent_unscored(folder, template):
    """Of 24 answers one is unscored, 4.2 %: bounds alone, (15 * 4 + 8) / 96 and that with 4 more."""
    text = render_page(template, content(folder, judged=True, missing=1))
    assert "no headline" in text and "23/24" in text and "70.8 to 75.0" in text
    assert "[70.0, 80.0]" not in text


@pytest.mark.parametrize("template", ["report.html.j2", "report.md.j2"])
def test_a_criterion_that_tells_no_layers_apart(folder, template):
    """Its agreement with the others is undefined, and said to be."""
    criteria = ["answer_similarity", "random"]
    layers = {
        **{"pairs_apart": 0, "pairs": 1, "outliers": [], "failed": {}, "scores": [], "figure": "<svg></svg>"},
        **{"label": "similarity", "criterion": criteria[0], "criteria": criteria, "search": None, "method": "one_shot"},
        "agreement": [(one, [format_tau(1.0 if one == other else None) for other in criteria]) for one in criteria],
        **{"embedder": "tiny", "calibration": 4},
    }
    text = render_page(template, content(folder) | {"layers": layers})
    expected = {"report.html.j2": "<td>+1.00</td><td>undefined</td>", "report.md.j2": "random undefined"}
    assert expected[template] in text


def test_a_score_of_any_size_can_be_read():
    """Four decimals would make 0.0000 of what a small criterion tells layers apart by."""
    written = [format_score(value) for value in (0.98765, -2, 12345.678, 0, 0.01234567, -0.0000321, float("inf"))]
    assert written == ["0.9877", "-2.0000", "12345.6780", "0.0000", "0.01235", "-3.210e-05", "inf"]


def test_metrics_stand_in_the_page(folder):
    text = page(folder)
    # prune: melanoma is always right, psoriasis always taken for it
    assert '<td class="wrong">4</td><td class="empty">0</td>' in text
    assert "prune: macro F1 33.3" in text and "4 of 8 named rightly" in text
    for heading in ("Which disease was named", "Does the model still use the image?", "What is retained"):
        assert f"<h2>{heading}</h2>" in text
    assert "not possible with these images and answers" in text  # no blank image was asked about
