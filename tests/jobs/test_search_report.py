"""The search's report from rows written by hand: its figures, and its page as a reader uses it."""

import json
import xml.etree.ElementTree as ET

import pytest

from jobs import search
from jobs.core.options import load_config
from jobs.core.run import Run
from jobs.figures.search import Mark, front_figure, layers_figure, retained_figure
from jobs.reporting import published
from jobs.reporting import search as search_report
from jobs.reporting.retained import format_points, retained_points
from jobs.reporting.search import write_report
from jobs.searching.budget import resolve
from jobs.searching.joint_table import JointRow
from tests.jobs.browsing import check_readable, check_width, needs_chromium, page_of

HOSTILE = "</td></tr></table><script>window.broken = 1</script>"
_UNKNOWN = dict.fromkeys(("score_pct", "score_interval_pct", "memory_gib", "ms_per_token", "params"))


def row(setting: str, score: float | None, gib: float, ms: float, quantizer: str = "none", **more) -> dict:
    """One row; evaluated if it has a score."""
    done = score is not None
    found = {
        **{"setting": setting, "status": "done", "reason": None, "quantizer": quantizer, "estimate_gib": gib},
        **{"score_pct": score, "score_interval_pct": done and [score - 5, min(100, score + 4)]},
        **{"memory_gib": gib, "memory_kind": "estimate", "ms_per_token": ms, "params": 1_000_000, "images": 24},
        **{"answers": 72, "device": "CPU", "threads": 1, "seconds_alone": 10 * gib, "removed_layers": [3, 4]},
        **{
            "simulated": False,
            "unpacked": False,
            "is_llm_judge": False,
            "score_kind": "baseline",
            "checkpoint": f"artifacts/{setting}",
        },
        **{"evaluation": setting, "artifacts": [], "screen": None, "gpu_hours_alone": 0.0},
        "command": f"python -m jobs.search --search.depths '[2]' # {setting}",
    }
    return {**found, **({} if done else _UNKNOWN), **more}


ROWS = [
    row("original", 96.0, 4.0, 30.0),
    row("2 out", 80.0, 3.5, 20.0),
    row("awq 4 bit", 95.5, 1.5, 25.0, "awq"),
    row("2 out, awq 4 bit", None, 1.2, 0.0, "awq", status="failed", reason=HOSTILE),
    row("2 out, nf4 4 bit", None, 1.3, 0.0, "nf4", status="screened out", reason="awq 4 bit is better"),
    row("int8", None, 9.0, 0.0, "int8", status="over budget", reason="the estimate of 9 GiB is above 5 GiB"),
    row("joint 1", 90.0, 1.1, 15.0, "mixed", method="joint", unpacked=True, device="NVIDIA T4"),
]
UNJUDGED = {"memory_gib": 1.0, "ms_per_token": 1.0, "params": 1}
DIFFERENCE = {"difference_finding": "unresolved", "difference_pct": 0.5, "difference_interval_pct": [-1.0, 2.0]}


def new_run(folder) -> Run:
    options = {"run_dir": str(folder), "search.budget.memory_gib": "3.9", "search.budget.ms_per_token": "26"}
    return Run(load_config(None, list(options.items())))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run = new_run(folder)
    choice = dict.fromkeys(JointRow.__required_keys__)
    choice |= {"method": "joint 1", "choice": [4, 0, 16, 8], "predicted": 0.5, "kl": 0.75, "estimate_bytes": 2**20}
    choice |= {"baseline_pct": 90.0, "baseline_interval_pct": [85.0, 94.0], "best_uniform": False}
    choice |= {"score_kind": "baseline", "status": "done", "reason": None}
    choice |= {"is_llm_judge": False, "judge_identity": None}
    choice |= {"difference_pct": 1.0, "difference_interval_pct": [-1.0, 3.0], "difference_finding": "unresolved"}
    uniform = {**choice, "method": "uniform 4 bit", "choice": [4, 4, 4, 0], "best_uniform": True, "predicted": None}
    added = {"choices": 9, "mean_predicted": 0.25, "mean_measured": 0.5, "spearman": 0.875}
    joint = {"budget_bytes": 2**20, "damage": "kl", "additivity": added, "candidates": [choice, uniform]}
    (folder / "joint.json").write_text(json.dumps(joint))
    found = resolve(ROWS, run.config.search.budget, lambda best, second: {**DIFFERENCE, "difference_detectable_pct": 2})
    return write_report(run, ROWS, found)


def test_figures_are_files_and_show_fronts_and_budget(path):
    texts = {}
    for name in ("front-memory", "front-time", "layers"):
        root = ET.parse(path.parent / f"{name}.svg").getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        texts[name] = ["".join(element.itertext()).strip() for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "budget 3.9" in texts["front-memory"] and "budget 26" in texts["front-time"]
    assert "memory (GiB; estimate)" in texts["front-memory"] and "VRAM (GB)" in texts["front-memory"]
    # the fronts: of memory joint 1 (7), awq (3), original (1); of time joint 1, awq, original
    for name in ("front-memory", "front-time"):
        assert {"1", "3", "7"} <= set(texts[name]) and not {"2", "4"} & set(texts[name])
    assert texts["layers"].count("4") >= 4 and texts["layers"].count("–") == 2 and "joint 1" in texts["layers"]


def test_a_figure_has_a_cross_for_each_published_point():
    marks = [Mark(1, 2.0, 90.0, 85.0, 95.0, "none", True)]
    figure = front_figure(marks, "memory", "score", None, [(p.memory_gb, p.score_pct) for p in published.MEMORY], "GB")
    assert len(published.MEMORY) == 7 + 6 + 3  # three of Table 4's rows are in the other tables
    crosses = ET.fromstring(figure).iter("{http://www.w3.org/2000/svg}use")
    styles = [use.get("style", "") for use in crosses]
    assert sum("#1a202c" in style for style in styles) >= len(published.MEMORY)
    assert "budget" not in figure


def test_a_budget_far_off_leaves_the_settings_their_room():
    def texts(limit: float) -> list[str | None]:
        marks = [Mark(number, cost, 90.0, 85.0, 95.0, "none", True) for number, cost in enumerate((3.0, 3.1, 9.0))]
        figure = ET.fromstring(front_figure(marks, "memory", "score", limit, [], "GB"))
        return [element.text for element in figure.iter() if element.tag.endswith("text")]

    assert {"budget 9.5", "4", "8"} <= {*texts(9.5)}
    assert {"budget 4000 →", "4", "8"} <= {*texts(4000.0)}  # the same scale


def test_every_number_of_bits_is_in_its_cell():
    texts = [e.text for e in ET.fromstring(layers_figure([("a", [0, 3, 4, 8, 16])])).iter() if e.tag.endswith("text")]
    assert texts.count("3") == 2 and texts.count("8") == texts.count("16") == texts.count("–") == 1


def test_without_results_there_is_a_page_that_says_so(tmp_path):
    rows = [row for row in ROWS if row["status"] != "done"]
    run = new_run(tmp_path)
    text = write_report(run, rows, resolve(rows, run.config.search.budget, lambda *_: {})).read_text()
    assert "none, no setting was evaluated" in text and "<svg" not in text and "A choice for every layer" not in text


def test_a_joint_choice_that_older_code_recorded_is_left_out(tmp_path):
    (tmp_path / "joint.json").write_text(json.dumps({"candidates": [{"method": "joint 1", "choice": [4]}]}))
    run = new_run(tmp_path)
    found = resolve(ROWS[-1:], run.config.search.budget, lambda *_: {})
    assert "A choice for every layer" not in write_report(run, ROWS[-1:], found).read_text()


def test_reuse_is_told_in_percent(tmp_path):
    sums = {"stages": 3, "seconds": 40.0, "seconds_apart": 100.0, "busy_seconds": 30.0}
    told = search_report._spent({**sums, "gpu_hours": 0.5, "gpu_hours_apart": 1.25})
    assert (told["saved"], told["gpu"]) == ("60", ["0.50", "1.25"])
    assert search_report._spent({**sums, "gpu_hours": None, "gpu_hours_apart": None})["gpu"] is None


def test_what_is_simulated_or_unpacked_is_marked_and_explained(tmp_path):
    packed = {**ROWS[-1], "device": "CPU", "memory_kind": "estimate, packed"}
    three = row("rtn 3 bit", 99.0, 1.0, 1.0, "rtn", simulated=True)
    text = search.format_rows([*ROWS[:-1], packed, three])
    assert "joint 1 (unpacked)" in text and "ms/token is that of 16-bit weights" in text
    assert "rtn 3 bit (simulated)" in text and "counted at the nominal bits; never the answer" in text
    assert "simulated" not in search.format_rows(ROWS) and "unpacked" not in search.format_rows(ROWS[:-1])
    run = new_run(tmp_path)
    rows = [*ROWS[:-1], packed, three, row("unjudged", None, 1.0, 1.0, status="done", **UNJUDGED)]
    found = resolve(rows, run.config.search.budget, lambda *_: {**DIFFERENCE, "difference_detectable_pct": 2})
    page = write_report(run, rows, found).read_text()
    for said in ("rtn 3 bit (simulated)", "joint 1 (unpacked)", "they are never the answer to a limit of time",
                 "not judged", "1 joint choices are left out", "1 evaluated settings are left out"):  # fmt: skip
        assert said in page


@pytest.fixture
def opened(browser, path):
    with page_of(browser, path) as tab:
        yield tab


def numbers(tab) -> list[int]:
    return [int(text) for text in tab.locator("#settings tbody td:first-child").all_inner_texts()]


@needs_chromium
def test_the_table_is_sorted_by_the_head_that_is_pressed(opened):
    assert numbers(opened) == [1, 2, 3, 4, 5, 6, 7]
    score = opened.get_by_role("button", name="score %")
    score.click()
    assert numbers(opened) == [2, 7, 3, 1, 4, 5, 6]  # without a score: last
    assert opened.locator("th[aria-sort=ascending]").inner_text().startswith("score %")
    score.focus()
    opened.keyboard.press("Enter")
    assert numbers(opened) == [1, 3, 7, 2, 4, 5, 6]
    opened.get_by_role("button", name="memory").click()
    assert numbers(opened) == [7, 4, 5, 3, 2, 1, 6]
    opened.get_by_role("button", name="setting").click()
    assert numbers(opened) == [2, 4, 5, 3, 6, 7, 1]
    assert opened.locator("th[aria-sort]").count() == 1


@needs_chromium
def test_the_answer_and_the_reasons_are_there(opened):
    answer = opened.locator(".answer").inner_text()
    assert "answer for 3.9 GiB and 26 ms/token: awq 4 bit: 95.5" in answer and "runner-up: joint 1" in answer
    assert "unresolved by this evaluation, which detects 2.0" in answer
    assert HOSTILE in opened.locator(".reasons").inner_text()
    assert "9 choices of the first round" in opened.locator("main").inner_text()
    assert opened.locator("tr", has_text="answer, front of memory, front of time").count() == 1
    opened.get_by_text("7, joint 1").click()
    assert opened.get_by_text("# joint 1").is_visible()


@needs_chromium
@pytest.mark.parametrize("width", [390, 1280])
def test_no_width_makes_the_page_scroll_sideways(opened, width):
    check_width(opened, width, tables=3)


@needs_chromium
def test_all_can_read_it(opened):
    check_readable(opened)


def test_what_is_retained_by_hand():
    """The original scores 0.5 on average over four images; without half of its weights 0.4, recovered 0.45."""
    scores = {"whole": [0.25, 0.75, 0.5, 0.5], "cut": [0.2, 0.6, 0.4, 0.4], "healed": [0.2, 0.7, 0.4, 0.5]}
    tables = {
        name: {str(n): {"baseline": value, "group": n} for n, value in enumerate(values)}
        for name, values in scores.items()
    }
    common = {"status": "done", "quantizer": "none", "method": "uniform"}
    rows = [
        common | {"setting": "original", "depth": 0, "recovery": "none", "params": 200, "evaluation": "whole"},
        common | {"setting": "2 out", "depth": 2, "recovery": "none", "params": 100, "evaluation": "cut"},
        common
        | {"setting": "both", "depth": 2, "width": 0.5, "recovery": "lora", "params": 50, "evaluation": "healed"},
        common | {"setting": "4 bit", "depth": 2, "recovery": "none", "quantizer": "rtn", "evaluation": "cut"},
        common | {"setting": "open", "depth": 4, "recovery": "none", "status": "open", "evaluation": "cut"},
    ]
    both, cut = retained_points(rows, lambda name: tables[name])
    assert (cut.line, cut.setting, cut.removed) == ("layers, not recovered", "2 out", 50.0)
    assert cut.retained == pytest.approx(80)
    assert cut.low == pytest.approx(80) == cut.high  # every image keeps just as much
    assert (both.line, both.removed, both.retained) == ("layers and width, lora", 75.0, pytest.approx(90))
    assert both.low < 90 < both.high
    assert format_points([cut]).splitlines()[2] == "| layers, not recovered | 2 out | 50.0 | 80.0 [80.0, 80.0] |"
    assert retained_points(rows[1:], lambda name: tables[name]) == []
    figure = retained_figure({"layers": [(50.0, 80.0, 75.0, 85.0), (75.0, 40.0, 30.0, 50.0)]})
    assert ET.fromstring(figure).tag.endswith("svg") and "score retained (%)" in figure
