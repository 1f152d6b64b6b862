"""Bad input: one clear sentence, an exit code, no traceback, nothing lost. Tried as a user would, in a process."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from actors.derm_tiny.draw import write_tree
from jobs.core import command
from tests.jobs.commands import CONFIG, ROOT, assert_says, run


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("images")
    write_tree(root, 4, seed=1)
    return root


def test_unknown_override(tmp_path):
    assert_says(run("ablate", "--run_dir", str(tmp_path), "--ablate.sample", "3"), "ablate.sample", "ablate.samples")


def test_missing_dataset_folder(tmp_path):
    result = run("prepare", "--run_dir", str(tmp_path), "--data.draw_per_class", "0", "--data.root", "/no/such/folder")
    assert_says(result, "/no/such/folder", "data.root")


def test_empty_class(tmp_path, images):
    root = tmp_path / "images"
    shutil.copytree(images, root)
    shutil.rmtree(root / "Melanoma")
    result = run("prepare", "--run_dir", str(tmp_path), "--data.root", str(root))
    assert_says(result, "'melanoma'", "no readable image", "Melanoma/*", "remove the class")


def test_missing_checkpoint(tmp_path):
    assert_says(run("prune", "--run_dir", str(tmp_path), "--model.path", "/no/model"), "/no/model", "model.path")


def test_relative_run_dir_inside_a_submitted_job():
    result = run("prepare", "--run_dir", "runs/x", RAY_JOB_CONFIG_JSON_ENV_VAR="{}")
    assert_says(result, "runs/x", "absolute path", "--run_dir /shared/x")


def test_uri_as_run_dir():
    assert_says(run("prepare", "--run_dir", "s3://bucket/x"), "s3://bucket/x", "folder")


def test_no_cluster_at_ray_address(tmp_path, images):
    arguments = ("--run_dir", str(tmp_path), "--data.root", str(images))
    result = run("ablate", *arguments, RAY_ADDRESS="127.0.0.1:1")
    assert_says(result, "127.0.0.1:1", "RAY_ADDRESS")


def test_run_dir_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    assert_says(run("prepare", "--run_dir", str(tmp_path / "file" / "run")), "file/run", "--run_dir")


@pytest.mark.slow
def test_report_before_compress(tmp_path, images):
    result = run("report", "--run_dir", str(tmp_path), "--data.root", str(images))
    assert_says(result, "Nothing to report", "jobs.compress")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_unwritable_run_folder(monkeypatch, tmp_path, capsys, code):
    def job(run):
        raise OSError(code, os.strerror(code), str(tmp_path))

    monkeypatch.setattr(sys, "argv", ["job", "--run_dir", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        command.main("doc", job)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert os.strerror(code) in said and str(tmp_path) in said and "--run_dir" in said


def test_a_full_disk_under_a_library_is_recognised():
    class LibraryError(Exception):
        pass

    said = command.explain(LibraryError("Error while serializing: I/O error: No space left on device (os error 28)"))
    assert said is not None and "Free space" in said
    assert command.explain(KeyError("a fault of ours")) is None


def test_a_really_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("cannot mount a small disk here")
    try:
        result = run("prepare", "--run_dir", str(disk))
        assert_says(result, "No space left on device", "--run_dir")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_messy_images_are_listed_and_skipped(tmp_path, images):
    from cluster.tables import read_table

    root = tmp_path / "images"
    shutil.copytree(images, root)
    folder = root / "Psoriasis"
    (folder / "zero.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("no image at all")
    source = Image.open(images / "Psoriasis" / "psoriasis-001-a.png")
    source.save(folder / "whole.jpg")
    (folder / "half.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:400])
    (root / "Thumbs.db").write_bytes(b"\0")
    arguments = ("--run_dir", str(tmp_path / "run"), "--data.root", str(root), "--data.annotations", "annotations.csv")
    result = run("prepare", *arguments)
    assert result.returncode == 0, result.stderr
    (table,) = (tmp_path / "run" / "artifacts").glob("data-*/skipped.parquet")
    reasons = {row["path"]: row["reason"] for row in read_table(table)}
    assert reasons["Psoriasis/zero.jpg"] == "empty file"
    assert "not a readable image" in reasons["Psoriasis/text.jpg"]
    assert "not a readable image" in reasons["Psoriasis/half.jpg"]
    assert reasons["Thumbs.db"] == "not an image type"
    assert "annotations.csv" not in reasons


@pytest.mark.slow
@pytest.mark.parametrize("job", ["ablate", "recover"])
def test_a_gpu_that_is_not_there(tmp_path, images, job):
    """A job that needs a GPU says so on a machine without one; it does not wait for ever."""
    result = run(job, "--run_dir", str(tmp_path), "--data.root", str(images), "--replicas.gpus", "1")
    assert_says(result, "1 GPUs", "there are", "replicas.gpus")


def test_interrupted_drawing_leaves_no_half_collection(tmp_path, monkeypatch):
    from actors.derm_tiny import draw
    from jobs import prepare
    from jobs.core.options import load_config
    from jobs.core.run import Run

    def interrupted(root, per_class, seed):
        (root / "Melanoma").mkdir()
        raise KeyboardInterrupt

    settings = load_config(str(ROOT / CONFIG), [("run_dir", str(tmp_path)), ("data.draw_per_class", "3")])
    with monkeypatch.context() as patch:
        patch.setattr(draw, "write_tree", interrupted)
        with pytest.raises(KeyboardInterrupt), Run(settings) as run_once:
            prepare.stage(run_once)
    with Run(settings) as again:
        again.make(prepare.stage(again))
        assert (tmp_path / "images-3-0" / "annotations.csv").is_file()
