"""jobs.verify on any folder, and the gate in the pipeline: what it refuses is not published."""

import shutil
import sys
from pathlib import Path

import pytest

from jobs import prune, quantize, recover, verify
from jobs.core import command
from jobs.core.workers import Workers
from tests.jobs.commands import assert_says, run
from tests.jobs.here import Worker, run_here
from tests.jobs.spoiling import UP, spoil
from tests.tiny import DERM_TINY


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(DERM_TINY, tmp_path / "copy")


TOWER = "vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight"


def test_a_folder_that_prunella_did_not_make(tmp_path, copy, monkeypatch, capsys):
    """It passes, and nothing is written into it."""
    before = {file.name: file.stat().st_mtime_ns for file in copy.iterdir()}
    verify.job(run_here(monkeypatch, tmp_path / "run", copy))
    said = capsys.readouterr().out
    assert f"verify: {copy} passes" in said and "sums       none recorded" in said
    assert {file.name: file.stat().st_mtime_ns for file in copy.iterdir()} == before


@pytest.mark.slow
def test_a_broken_folder_in_one_sentence(tmp_path, copy):
    """As a user runs it: exit code 1, the tensor's name, no traceback."""
    spoil(copy, UP)
    result = run("verify", "--run_dir", str(tmp_path / "run"), "--model.path", str(copy))
    assert_says(result, f"The checkpoint '{copy}' is refused: '{UP}' holds NaN")
    assert result.returncode == 1
    assert [line for line in result.stderr.splitlines() if line.startswith("verify:")] == result.stderr.splitlines()[
        -1:
    ]


def test_a_text_only_model(tmp_path, monkeypatch):
    """Jobs that take a checkpoint say what is wrong with it, before any other stage runs."""
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    words = "'llama' is not a LLaVA's: it lacks text_config or vision_config"
    run = run_here(monkeypatch, tmp_path / "run", tmp_path / "llama", prune__order="[1, 0]", quantize__method="nf4")
    for attempt in (lambda: prune.job(run), lambda: quantize.check(run, quantize.chosen_settings(run))):
        with pytest.raises(ValueError, match=words):
            attempt()
    with pytest.raises(RuntimeError, match=f"is refused: .*{words}"):
        verify.job(run)
    assert not list((tmp_path / "run" / "artifacts").glob("*-*"))


def test_no_folder(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"model\.path 'owner/name' is not a folder"):
        verify.job(run_here(monkeypatch, tmp_path, "owner/name"))


def test_an_artifact_that_was_changed(tmp_path, monkeypatch, capsys):
    """A manifest knows the sums of the tensors: a number that is changed later is found."""
    run = run_here(monkeypatch, tmp_path, prune__order="[2]", prune__layers=1)
    folder = run.store.root / prune.stage(run, run.base_model()).name
    prune.job(run)
    verify.job(run_here(monkeypatch, tmp_path, folder))
    assert "sums       equal to the recorded ones" in capsys.readouterr().out
    spoil(folder, UP, 0.5)
    with pytest.raises(RuntimeError, match=f"'{UP}' is not what was published"):
        verify.job(run_here(monkeypatch, tmp_path, folder))


class ForgetfulSurgeon(Worker):
    """Prunes, but leaves the count of layers in config.json as it was."""

    def call(self, method, path, out, *args):
        done = super().call(method, path, out, *args)
        shutil.copyfile(DERM_TINY / "config.json", Path(out) / "config.json")
        return done


class SpoiledQuantizer(Worker):
    """Rounds, and leaves a scale that is no number."""

    def call(self, method, spec, settings, calibration, out):
        facts = super().call(method, spec, settings, calibration, out)
        spoil(Path(out), UP.replace("weight", "scales"))
        return facts


class IdleTrainer(Worker):
    """Does not train, and changes the vision tower."""

    def __init__(self, *_, **__):
        pass

    def stream(self, method, conversations, settings, out):
        assert conversations
        shutil.copytree(DERM_TINY, out, dirs_exist_ok=True)
        spoil(Path(out), TOWER, 0.5)
        yield {"step": 1, "loss": 1.0, "cross_entropy": 1.0, "learning_rate": 0.1}


CONFIG = DERM_TINY.parents[2] / "configs" / "derm-tiny.yaml"
DRAWN = ["--config", str(CONFIG), "--data.draw_per_class", "3"]
BROKEN = {
    "prune": (
        "actors.checkpoint.pruning:Surgeon",
        ForgetfulSurgeon,
        ["--prune.layers", "2", "--prune.order", "[2, 5]"],
    ),
    "quantize": (quantize.QUANTIZER, SpoiledQuantizer, ["--quantize.method", "rtn", *DRAWN]),
    "recover": ("actors.training.trainer:Trainer", IdleTrainer, DRAWN),
}


@pytest.mark.parametrize(
    ("job", "words"),
    [
        (prune, "says 10 decoder layers, the files hold 8"),
        (quantize, f"'{UP.replace('weight', 'scales')}' holds NaN"),
        (recover, f"'{TOWER}' is not '{TOWER}' of the model before"),
    ],
)
def test_what_the_gate_refuses_is_not_published(job, words, tmp_path, monkeypatch, capsys):
    """The job ends with the gate's sentence and exit code 1, and leaves no artifact."""
    kind = job.__name__.removeprefix("jobs.")
    broken, worker, options = BROKEN[kind]
    workers = {broken: worker}
    monkeypatch.setattr(
        Workers, "worker", lambda self, target, *_, **kwargs: workers.get(target, Worker)(target, **kwargs)
    )
    monkeypatch.setattr(sys, "argv", [kind, "--run_dir", str(tmp_path), *options])
    with pytest.raises(SystemExit) as stop:
        command.main("doc", job.job)
    assert stop.value.code == 1
    assert words in capsys.readouterr().err
    assert not list((tmp_path / "artifacts").glob(f"{kind}-*"))


def test_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["verify", "--help"])
    command.main(verify.__doc__, verify.job)
    said = capsys.readouterr().out
    assert "Takes any folder" in said and "--model.path" in said and "1 if it is refused" in said
