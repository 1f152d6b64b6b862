"""Pages as a reader sees them, in the machine's Chromium."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on the PATH (Debian: apt-get install chromium): the page was not tried out"
)
# The least contrast that text has to have, and where it is less (WCAG 2.2, 1.4.3 AA).
LOW_CONTRAST = """() => {
  const light = (text) => {
    const parts = text.match(/[\\d.]+/g).map(Number);
    const [r, g, b] = parts.slice(0, 3).map((v) => v / 255)
      .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return { value: 0.2126 * r + 0.7152 * g + 0.0722 * b, seen: parts.length < 4 || parts[3] > 0 };
  };
  const behind = (element) => {
    for (; element; element = element.parentElement) {
      const found = light(getComputedStyle(element).backgroundColor);
      if (found.seen) return found.value;
    }
    return 1;
  };
  const low = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || element.closest("svg, script, style, noscript") || !element.getClientRects().length) continue;
    const style = getComputedStyle(element), a = light(style.color).value, b = behind(element);
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    if (ratio < (large ? 3 : 4.5)) low.push(`${element.outerHTML.slice(0, 60)} ${ratio.toFixed(2)}`);
  }
  return low;
}"""

# Texts of a figure that lie on each other.
OVERLAPPING = """() => [...document.querySelectorAll("svg")].flatMap((figure) => {
  const texts = [...figure.querySelectorAll("text")].map((one) => [one.textContent, one.getBoundingClientRect()]);
  return texts.flatMap(([a, one], n) => texts.slice(n + 1)
    .filter(([, other]) => Math.min(one.right, other.right) - Math.max(one.left, other.left) > 1
      && Math.min(one.bottom, other.bottom) - Math.max(one.top, other.top) > 1)
    .map(([b]) => `${a} on ${b}`));
})"""


@contextmanager
def page_of(browser, path: Path) -> Iterator:
    """The page, newly loaded; in the end no script but its own ran, nothing was fetched, nothing was complained of."""
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    complaints: list[str] = []
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("request", lambda request: complaints.append(request.url) if request.url.startswith("http") else None)
    tab.set_default_timeout(5000)
    tab.goto(path.as_uri())
    yield tab
    assert tab.evaluate("window.broken") is None and complaints == []
    tab.close()


def check_width(tab, width: int, tables: int) -> None:
    """The page never scrolls sideways; its tables, at least so many, do so in boxes that keys reach."""
    tab.set_viewport_size({"width": width, "height": 900})
    tab.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    assert tab.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [width, width]
    wide = tab.evaluate("[...document.querySelectorAll('table')].map((t) => !!t.closest('.scroll[tabindex=\"0\"]'))")
    assert len(wide) >= tables and all(wide)


def check_readable(tab) -> None:
    """Contrast, figures whose texts are apart, order of headings, and texts for what is no text."""
    tab.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    assert tab.evaluate(LOW_CONTRAST) == []
    assert tab.evaluate(OVERLAPPING) == []
    levels = tab.evaluate("[...document.querySelectorAll('h1, h2, h3, h4')].map((h) => Number(h.tagName[1]))")
    assert levels[0] == 1 and all(b - a <= 1 for a, b in pairwise(levels))
    assert tab.evaluate("[...document.querySelectorAll('select, input')].every((one) => one.labels.length === 1)")
    assert tab.evaluate("[...document.querySelectorAll('img')].every((one) => one.alt)")
    assert tab.evaluate("[...document.querySelectorAll('svg')].every((one) => one.closest('[role=img][aria-label]'))")
