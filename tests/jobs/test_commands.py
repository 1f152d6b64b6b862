"""One command on a private Ray, as a user starts it: what it prints, what it says, what it leaves, and again."""

from pathlib import Path

from tests.jobs.commands import run


def test_a_command_and_the_same_again(tmp_path):
    options = ("--run_dir", str(tmp_path), "--prune.layers", "2", "--prune.order", "[4, 5]")
    first = run("prune", *options)
    assert first.returncode == 0, first.stderr
    said, _, folder = first.stdout.strip().rpartition(" ")
    assert said == "prune: the checkpoint is" and first.stdout.count("\n") == 1
    assert (Path(folder) / "model.safetensors").is_file() and (Path(folder) / "README.md").is_file()
    assert "prune: computing" in first.stderr and "prune: removed layers [4, 5], 8 are left" in first.stderr
    again = run("prune", *options)
    assert (again.returncode, again.stdout) == (0, first.stdout)
    assert "exists, reused" in again.stderr and "computing" not in again.stderr
