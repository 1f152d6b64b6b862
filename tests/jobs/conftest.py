"""What several tests of jobs/ share."""

import pytest

from tests.jobs.browsing import CHROMIUM
from tests.jobs.engines import path, run_of  # noqa: F401 (fixtures)
from tests.jobs.judging import hurried  # noqa: F401 (a fixture)


@pytest.fixture(scope="module")
def browser():
    """The machine's Chromium, without a window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM)
        yield opened
        opened.close()
