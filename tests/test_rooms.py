"""The import rules of the three rooms hold, and the contract can fail."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINT = Path(sys.executable).with_name("lint-imports")


def lint(folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run([LINT, "--no-cache"], cwd=folder, capture_output=True, text=True)


def test_rooms_keep_their_rules():
    result = lint(ROOT)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("actors", "import ray"),
        ("actors", "from cluster import tables"),
        ("cluster", "import torch"),
        ("cluster", "import transformers"),
        ("jobs", "import torch"),
        ("jobs/ranking", "import jobs.searching.rows"),
        ("jobs/core", "from jobs import prune"),
        ("jobs", "import numpy as np"),
        ("jobs", "from scipy.stats import kendalltau"),
    ],
)
def test_a_planted_violation_is_caught(tmp_path, room, line):
    for name in ("actors", "cluster", "jobs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("checkpoint", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / room / "planted.py").write_text(f"{line}\n")
    result = lint(tmp_path)
    assert result.returncode != 0
    assert f"{room.replace('/', '.')}.planted" in result.stdout


def test_top_level_is_as_given():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    top = {Path(name).parts[0] for name in tracked if not name.startswith(".")}
    assert top == {
        *("pyproject.toml", "README.md", "configs", "jobs", "actors", "cluster", "tests"),
        *("LICENSE", "Makefile", "constraints.txt", "docs"),
    }


def test_jobs_start_without_torch():
    code = "import sys, jobs.compress, jobs.report, jobs.demo; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.slow
def test_nothing_connects_at_import():
    """Every module imports with the network refused."""
    code = (
        "import importlib, pathlib, socket\n"
        "def refuse(*_): raise AssertionError('a connection at import')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "for room in ('actors', 'cluster', 'jobs'):\n"
        "    for path in sorted(pathlib.Path(room).rglob('*.py')):\n"
        "        importlib.import_module('.'.join(path.with_suffix('').parts).removesuffix('.__init__'))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_no_test_module_imports_another():
    """What tests share lives in helper modules, so that a test file can be moved or deleted alone."""
    found = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found += [f"{path}: {module}" for module in modules if module.split(".")[-1].startswith("test_")]
    assert not found


def test_a_file_at_the_top_of_jobs_is_a_command():
    """What commands share lives in the rooms below; the table of the guide lists the commands."""
    for path in sorted((ROOT / "jobs").glob("*.py")):
        if path.name != "__init__.py":
            assert 'if __name__ == "__main__":' in path.read_text(), f"{path.name} is no command: put it into a room"
