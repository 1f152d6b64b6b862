"""README and docs/: short enough, no dead links, and no command, option or target that does not exist."""

import importlib.util
import re
from pathlib import Path

import pytest

from jobs.core.options import valid_keys

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 1100


@every_document
def test_links_lead_somewhere(document):
    links = re.findall(r"\]\(([^)#\s]+)", document.read_text())
    dead = [link for link in links if "://" not in link and not (document.parent / link).exists()]
    assert not dead


@every_document
def test_jobs_exist(document):
    jobs = re.findall(r"(?:python -m |`)(jobs(?:\.[a-z_]+)+)", document.read_text())
    missing = [job for job in jobs if importlib.util.find_spec(job.removesuffix(".py")) is None]
    assert not missing


@every_document
def test_options_exist(document):
    keys = set(valid_keys())
    options = set(re.findall(r"(?<!-)--([a-z_]+\.[a-z_.]*[a-z_])", document.read_text()))
    assert options <= keys


@every_document
def test_make_targets_exist(document):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"`make ([a-z-]+)", document.read_text()))
    assert named <= targets
