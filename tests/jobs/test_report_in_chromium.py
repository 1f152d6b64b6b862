"""The report's page as a reader uses it, in headless Chromium: filters, an answer opened, keys, narrow screens."""

import re
from pathlib import Path

import pytest

from tests.jobs.browsing import check_readable, check_width, needs_chromium, page_of
from tests.jobs.pages import HOSTILE, METHODS, page

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    (folder / "report.html").write_text(page(folder, judged=True, missed=3))
    return folder / "report.html"


@pytest.fixture
def opened(browser, path):
    with page_of(browser, path) as tab:
        yield tab


def found(tab) -> str:
    return tab.get_by_role("status").inner_text()


def test_filters(opened):
    entries = opened.locator("#entries > details")
    assert found(opened) == "24 of 24 questions match; 20 shown." and entries.count() == 20
    opened.get_by_label("Class").select_option("psoriasis")
    assert found(opened).startswith("12 of 24")
    assert set(opened.locator("#entries summary strong").all_inner_texts()) == {"psoriasis"}
    opened.get_by_label("Question", exact=True).select_option("Tell the name?")
    assert found(opened).startswith("4 of 24")
    opened.get_by_label("Disagreement").select_option("other disease named")
    assert found(opened).startswith("4 of 24")  # prune takes all of them for melanoma
    opened.get_by_label("Class").select_option("melanoma")
    assert found(opened).startswith("0 of 24") and entries.count() == 0
    opened.get_by_role("button", name="Show all").click()
    assert found(opened).startswith("24 of 24") and opened.get_by_label("Class").input_value() == ""
    opened.get_by_label("Text in question or answers").fill("ONERROR")
    assert found(opened).startswith("1 of 24")


@pytest.mark.parametrize(
    ("kind", "count"),
    # 8 hostile descriptions; 4 names and 4 causes of psoriasis; one answer of prune differs from its twins in nothing
    [("other words", 16), ("other disease named", 4), ("baseline apart by 0.5 or more", 16), ("other label", 16)],
)
def test_disagreement(opened, kind, count):
    option = opened.locator("select[name=differ] option").filter(has_text=kind)
    opened.get_by_label("Disagreement").select_option(option.get_attribute("value"))
    assert found(opened).startswith(f"{count} of 24")


def test_an_answer_opened(opened):
    opened.get_by_label("Class").select_option("psoriasis")
    opened.get_by_label("Question", exact=True).select_option("Tell the name?")
    entry = opened.locator("#entries > details").first
    entry.locator("summary").click()
    entry.locator("dl").wait_for()
    text = entry.inner_text()
    assert entry.locator("img").get_attribute("alt") == "test image lesion-1.png, class psoriasis"
    assert entry.locator("img").evaluate("image => image.naturalWidth") == 112
    assert entry.locator(".reference").inner_text() == "This is psoriasis."
    assert re.search(r"original, quant\s+baseline 1.00\s+names psoriasis, right\s+judge 4 of 4", text)
    assert re.search(r"prune\s+baseline 0.00\s+names melanoma, wrong\s+judge 1 of 4", text)
    assert "Judge: Because of This is melanoma." in text
    entry.locator("summary").click()
    assert not entry.locator("dl").is_visible()


def test_hostile_answers_are_shown_as_they_are(opened):
    opened.get_by_label("Question", exact=True).select_option("Tell the describe?")
    summaries = opened.locator("#entries summary")
    for number in range(summaries.count()):
        summaries.nth(number).click()
    shown = opened.locator("#entries .answer").all_text_contents()
    assert all(one in shown for one in HOSTILE[:7])
    assert opened.locator("#entries h1, #entries script, #entries style").count() == 0
    assert opened.get_by_text("(cut: 9,000 characters in all)").first.is_visible()
    assert opened.locator("#entries .badge").filter(has_text="never ended").count() == 1
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_keys_alone(opened):
    opened.get_by_label("Class").focus()
    opened.keyboard.press("p")  # psoriasis
    assert found(opened).startswith("12 of 24")
    for _ in range(3):
        opened.keyboard.press("Tab")
    opened.keyboard.type("number 1")
    assert found(opened).startswith("1 of 24")
    opened.keyboard.press("Enter")  # no form is sent
    opened.keyboard.press("Tab")  # Show all
    opened.keyboard.press("Tab")
    opened.keyboard.press("Enter")
    opened.locator("#entries dl").get_by_text("A spot, number 1.").first.wait_for()
    opened.keyboard.press("Shift+Tab")
    opened.keyboard.press("Space")
    assert found(opened).startswith("24 of 24")
    opened.locator("#more").focus()
    opened.keyboard.press("Enter")
    assert found(opened) == "24 of 24 questions match; 24 shown." and not opened.locator("#more").is_visible()
    assert opened.evaluate("document.activeElement === document.querySelectorAll('#entries summary')[20]")


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_itself_never_scrolls_sideways(opened, width):
    check_width(opened, width, tables=6)


def test_readable_by_all(opened):
    check_readable(opened)
    assert opened.get_by_role("alert").inner_text().startswith("This judged run is flagged")


def test_without_javascript(browser, path):
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto(path.as_uri())
    assert tab.get_by_text("needs JavaScript").is_visible() and not tab.locator("#filters").is_visible()
    assert tab.locator("article.sample").count() == 6 and tab.locator("article img").count() >= 5
    assert all(method in tab.locator("article").first.inner_text() for method in METHODS)
    tab.locator("details summary").nth(1).click()
    assert tab.locator("table.matrix").nth(1).is_visible()
    context.close()
