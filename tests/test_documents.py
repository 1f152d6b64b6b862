"""README and docs/: short enough, no dead links, and no command, option or target that does not exist."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest

from jobs.core.options import valid_keys
from tests.documents import DOCUMENTS, ROOT, Block, blocks

LACKED = {"a cluster", "a judge model", "your model", "your images"}  # by the machine of the tests
BY_CI = re.compile(r"(?P<target>make [a-z-]+)|\.venv/bin/python -m pytest (?P<file>\S+)")
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


def test_documents_have_commands():
    assert {block.document for block in blocks()} >= {"README.md", "guide.md", "search.md", "judge.md"}


@pytest.mark.parametrize("block", blocks(), ids=lambda block: f"{block.document}-{block.lines[0][:30]}")
def test_a_block_runs_here_or_says_what_it_needs(block: Block):
    """make's targets and single files of tests are run by CI; python's jobs by the test below."""
    assert set(block.needs.split(", ")) - {""} <= LACKED
    if block.needs:
        return
    ci = (ROOT / ".ci/run").read_text() + "make demo"  # tests/jobs/test_demo.py
    for line in block.lines:
        match = BY_CI.fullmatch(line)
        if match:
            assert (match["target"] or "make test") in ci and (ROOT / (match["file"] or "Makefile")).is_file()
        else:
            assert re.match(r"(\w+=\$\()?\.venv/bin/python -m jobs\.", line), line


@pytest.mark.slow
def test_the_documents_commands_run(tmp_path):
    """One after the other in one run folder, as a reader would; the only change is where the results go."""
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@" --run_dir {tmp_path}/run\n')
    python.chmod(0o755)
    env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    ran = 0
    for block in blocks():
        if block.needs or all(BY_CI.fullmatch(line) for line in block.lines):
            continue
        script = "\n".join(block.lines).replace(".venv/bin/python", str(python))
        done = subprocess.run(
            ["sh", "-e", "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{block.document}: {script}\n{done.stderr}"
        ran += len(block.lines)
    assert ran >= 4
