"""README and docs/: short enough, no dead links, no command, option, target or file that does not exist.

Every command is run by a test or by CI, or the document says what it needs that this machine lacks.
"""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tomllib
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import pytest

from jobs.core.command import parse
from jobs.core.facts import Metrics, Profile, SelectFacts
from jobs.core.options import load_config, valid_keys
from jobs.ranking.rows import Agreement, LayerScore, RangeRow
from jobs.reporting.summary import SummaryRow
from jobs.searching.joint_table import Additivity, JointRow, SingleRow, TriedRow
from jobs.searching.table import SearchRow
from tests.documents import DOCUMENTS, RECORDS, ROOT, Block, blocks, inline_commands, job_commands

LACKED = {"a cluster", "a GPU", "a judge model", "your model", "your images"}  # by the machine of the tests
RUN_BY = {  # what else runs a command, and the words by which it does
    "make demo": ("tests/jobs/test_demo.py", '"-m", "jobs.demo"'),
    "make test": (".ci/run", "\nmake test\n"),
    "make lint": (".ci/run", "\nmake lint\n"),
    "make test-slow": (".ci/run", "\nmake test-slow"),
}
COMMANDS = blocks("", "sh")
MEASURES = (
    *(SummaryRow, SearchRow, JointRow, Metrics, Profile),
    *(LayerScore, Agreement, RangeRow, Additivity, SingleRow, TriedRow),
)
every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
every_block = pytest.mark.parametrize("block", COMMANDS, ids=str)


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
    """Dotted ones stand alone in sentences, too; those of a command are options of that very job."""
    keys = set(valid_keys())
    text = document.read_text()
    assert set(re.findall(r"(?<!-)--([a-z_]+\.[a-z_.]*[a-z_])", text)) <= keys
    for job, arguments in [*job_commands(text), *inline_commands(document)]:
        options = set(re.findall(r"(?<=--)[a-z][a-z_.-]+", arguments)) - {"help"}
        unknown = {option for option in options if not re.search(rf"--{re.escape(option)}\b", help_of(job))}
        assert not unknown, f"{job} has no {unknown}"


@every_document
def test_fields_exist(document):
    """Fields of the config are written as `section.field`."""
    keys = set(valid_keys())
    sections = {key.split(".")[0] for key in keys if "." in key}
    fields = re.findall(r"`([a-z_]+)\.([a-z_.]+)(?=[`: ])", document.read_text())
    known = keys | {key.rpartition(".")[0] for key in keys}
    unknown = {f"{section}.{name}" for section, name in fields if section in sections} - known
    assert not {name for name in unknown if not name.endswith((".json", ".py", ".yaml", ".parquet"))}


@every_document
def test_make_targets_exist(document):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", document.read_text(), re.M))
    assert named <= targets


@every_document
def test_files_exist(document):
    """Those that a document names by their path; in the records they are those of that day."""
    if document.name in RECORDS:
        return
    text = re.sub(r"https?://\S+", "", document.read_text())
    paths = re.findall(r"\b((?:actors|cluster|configs|docs|jobs|tests)/[\w./*-]*[\w*/])", text)
    missing = [path for path in paths if not list(ROOT.glob(path)) and path != "configs/mine.yaml"]
    assert not missing


@every_document
def test_extras_exist(document):
    known = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    named = {extra for extras in re.findall(r"'\.\[([a-z,-]+)\]'", document.read_text()) for extra in extras.split(",")}
    assert named <= known


def test_the_readmes_config_is_short_and_valid(tmp_path):
    config = load_config(str(my_config(tmp_path)), [])
    assert (config.run_dir, config.replicas.gpus) == ("runs/mine", 1) and len(config.data.classes) == 2
    assert len(my_config(tmp_path).read_text().splitlines()) == 5


@every_block
def test_commands_are_understood(block: Block, tmp_path):
    """By the parser of the job: options, values and configs; configs/mine.yaml is the config of the README."""
    for job, arguments in job_commands(block.text):
        words = [word.replace("configs/mine.yaml", str(my_config(tmp_path))) for word in shlex.split(arguments)]
        shorthands = dict(re.findall(r"^  --(\S+) +short for --(\S+)$", help_of(job), re.M))
        if job not in (
            "jobs.convert",
            "jobs.demo",
            "jobs.make_derm_smol",
            "jobs.make_derm_tiny",
        ):  # they have no config
            parse(words, shorthands)


def test_every_command_is_in_the_lists():
    """The guide's table, and the import contract that keeps commands out of the lower rooms."""
    commands = {f"jobs.{path.stem}" for path in (ROOT / "jobs").glob("*.py")} - {"jobs.__init__"}
    assert set(re.findall(r"^\| `(jobs\.\w+)` \|", (ROOT / "docs/guide.md").read_text(), re.M)) == commands
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (contract,) = [each for each in contracts if each["name"] == "lower rooms import no command"]
    assert set(contract["forbidden_modules"]) == commands


def test_log_entries_name_their_command():
    """The command behind the numbers, or the test, or that it was not kept."""
    entries = re.split(r"^## ", (ROOT / "docs/LOG.md").read_text(), flags=re.M)[1:]
    nameless = [
        entry.partition("\n")[0]
        for entry in entries
        if not re.search(r"`(?:\w+=\w+ )?(?:make\s|python\s+-m\s|tests/)|not kept", entry)
    ]
    assert entries and not nameless


def test_documents_have_commands():
    assert {block.document.name for block in COMMANDS} >= {
        *("README.md", "guide.md", "ablation.md", "checkpoints.md", "judge.md", "numbers.md", "search.md"),
        "CONTRIBUTING.md",
    }


@every_block
def test_a_block_runs_here_or_says_what_it_needs(block: Block):
    """Targets of make are run by what RUN_BY says, files of tests by CI, jobs by the test below."""
    assert set(block.needs.split(", ")) - {""} <= LACKED
    if block.needs:
        return
    for line in block.lines:
        if line in RUN_BY:
            file, words = RUN_BY[line]
            assert words in (ROOT / file).read_text()
        elif match := re.fullmatch(r"\.venv/bin/python -m pytest (\S+)", line):
            assert (ROOT / match[1]).is_file()
        else:
            assert re.match(r"(\w+=\$\()?\.venv/bin/python -m jobs\.", line), line


def test_every_measure_is_defined():
    """Every column of the tables of results stands in docs/numbers.md, itself or by a pattern such as `*_p5_p95`."""
    named = set(re.findall(r"`([a-z0-9_*]+)`", (ROOT / "docs" / "numbers.md").read_text()))
    patterns = [name for name in named if "*" in name and len(name) > 6]
    columns = {*(column for kind in MEASURES for column in kind.__annotations__), "gain", "gain_interval"}
    assert {"gain", "gain_interval"} <= SelectFacts.__annotations__.keys()
    undefined = {c for c in columns - named if not any(fnmatchcase(c, pattern) for pattern in patterns)}
    assert not undefined
    unused = {p for p in patterns if not any(fnmatchcase(column, p) for column in columns)}
    assert not unused


@pytest.mark.slow
def test_the_documents_commands_run(tmp_path):
    """One after the other in one run folder, as a reader would; the only change is where the results go."""
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@" --run_dir {tmp_path}/run\n')
    python.chmod(0o755)
    env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    ran = 0
    for block in COMMANDS:
        if block.needs or not any("-m jobs." in line for line in block.lines):
            continue
        script = "\n".join(block.lines).replace(".venv/bin/python", str(python))
        done = subprocess.run(
            ["sh", "-e", "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{block}: {script}\n{done.stderr}"
        ran += len(block.lines)
    assert ran >= 7


@cache
def help_of(job: str) -> str:
    """Return what --help of a job prints."""
    return subprocess.run(
        [sys.executable, "-m", job, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout


def my_config(folder: Path) -> Path:
    """Write the README's config into a folder, and return the file."""
    (block,) = blocks("yaml")
    (folder / "mine.yaml").write_text(block.text)
    return folder / "mine.yaml"
