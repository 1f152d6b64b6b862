"""jobs.recover from the config to the checkpoint: the teacher, the data's share, what a killed training leaves."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from actors.checkpoint.tensors import iterate_tensors
from actors.gate.check import Gate
from actors.specs import GateError
from actors.training.settings import SNAPSHOTS
from actors.training.teacher import Teacher
from actors.training.trainer import Loss, Trainer
from jobs import prepare, prune, recover, verify
from jobs.core.facts import PatchFacts, RecoverFacts
from jobs.reporting import card
from jobs.searching.space import Setting, config_of
from tests.jobs.commands import CONFIG, ROOT, options
from tests.jobs.commands import run as command
from tests.jobs.here import run_here
from tests.tiny import DERM_TINY

OPTIONS = {
    "data__draw_per_class": 2,
    "prune__layers": 2,
    "prune__order": "[4, 5]",
    "recover__train": "lora",
    "recover__batch": 8,
    "quantize__method": "rtn",
}


@pytest.fixture
def start(monkeypatch, tmp_path):
    def run(**options):
        return run_here(monkeypatch, tmp_path / "run", config="configs/derm-tiny.yaml", **{**OPTIONS, **options})

    return run


def pruned_stage(run):
    return prune.stage(run, run.base_model())


def test_students_share_the_teachers_states(start):
    """Two depths and two objectives with one teacher: its states are written once, and each student is its own."""
    names = []
    for layers, objective in ((2, "sft+hidden"), (1, "sft+hidden"), (2, "{logits: 1}")):
        run = start(prune__layers=layers, recover__objective=objective)
        made = recover.stage(run, pruned_stage(run), prepare.stage(run))
        names.append(run.make(made))
        facts = run.facts(made, RecoverFacts)
        settings = facts["history"][-1]["settings"]
        assert settings["objective"] == ("0.5 sft + 0.5 hidden" if "hidden" in objective else "1 logits")
        rows = recover.LOSSES.read(run.folder_of(made))
        assert rows[-1]["loss"] == facts["last_loss"] and rows[0]["loss"] != rows[0]["cross_entropy"]
        assert not (run.folder_of(made) / SNAPSHOTS).exists()
    assert len(set(names)) == 3 and len(list(run.store.root.glob("states-*"))) == 1


def test_layers_are_matched_over_two_prunings(start, tmp_path):
    """The record of a checkpoint that was pruned twice says which of the original's layers it has."""
    run = start(recover__objective="layers", recover__teacher=str(DERM_TINY))
    once = run.make(pruned_stage(run))
    again = start(model__path=once, prune__layers=1, prune__order="[0]")
    stage = prune.stage(again, again.base_model())
    original, half = run.base_model(), again.base_model()
    assert card.kept_layers(again, stage, original) == [1, 2, 3, 6, 7, 8, 9]
    assert card.kept_layers(again, stage, half) == [1, 2, 3, 4, 5, 6, 7]  # half itself lacks 4 and 5
    assert card.kept_layers(run, original, original) == list(range(10))
    foreign = shutil.copytree(run.folder_of(pruned_stage(run)), tmp_path / "foreign")
    (foreign / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"Nothing records which layers of .* are left in"):
        card.kept_layers(run, run.source(str(foreign), "model.path"), original)
    with pytest.raises(ValueError, match=r"Nothing records which layers"):
        card.kept_layers(run, original, half)
    made = recover.stage(run, pruned_stage(run), prepare.stage(run))
    run.make(made)
    rows = recover.LOSSES.read(run.folder_of(made))
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_a_share_of_the_data_holds_a_smaller_one(start):
    drawn = {}
    for fraction in (0.05, 0.5, 1.0):
        run = start(recover__fraction=fraction)
        made = recover.stage(run, run.base_model(), prepare.stage(run))
        run.make(made)
        facts = run.facts(made, RecoverFacts)
        drawn[fraction] = facts["conversations"], facts["history"][-1]["digest"]
    counts = [count for count, _ in drawn.values()]
    whole = len(prepare.training_conversations(run.make(prepare.stage(run))))
    assert counts == [-(-whole // 20), -(-whole // 2), whole] and len(set(drawn.values())) == 3


def test_a_killed_job_goes_on(start, monkeypatch):
    """The losses are those of a job that nobody killed, and the second one trains only what was left."""
    whole = start(recover__epochs=2)
    made = recover.stage(whole, whole.base_model(), prepare.stage(whole))
    whole.make(made)
    expected = recover.LOSSES.read(whole.folder_of(made))
    whole.store.remove(made.name)
    run = start(recover__epochs=2, recover__checkpoint_every=3)
    assert recover.stage(run, run.base_model(), prepare.stage(run)) == made  # the same artifact
    train = Trainer.train

    def stop(self, *args):
        for row in train(self, *args):
            if row["step"] == 5:
                raise KeyboardInterrupt
            yield row

    monkeypatch.setattr(Trainer, "train", stop)
    with pytest.raises(KeyboardInterrupt):
        run.make(made)
    monkeypatch.setattr(Trainer, "train", train)
    backward, steps = Loss.backward, []
    monkeypatch.setattr(Loss, "backward", lambda *args: steps.append(1) or backward(*args))
    run.make(made)
    assert recover.LOSSES.read(run.folder_of(made)) == expected and len(steps) == len(expected) - 3


def test_a_teacher_must_be_named_where_none_is_known(start):
    with pytest.raises(ValueError, match=r"The recovery lora\+sft\+hidden needs a teacher: set"):
        recover.job(start(recover__objective="sft+hidden"))
    with pytest.raises(ValueError, match=r"recover.teacher"):
        recover.job(start(recover__objective="hidden", recover__teacher="/nowhere"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recover__train": "lora+qlora"}, "give lora or qlora, not both"),
        ({"recover__train": "[lora, vision]"}, "there is no 'vision'"),
        ({"recover__objective": "kd"}, "there is no 'kd'"),
        ({"recover__objective": "{sft: -1}"}, "should be greater than 0"),
        ({"recover__fraction": "1.5"}, "recover.fraction"),
        ({"search__recoveries": "[lore]"}, "no recovery 'lore'"),
    ],
)
def test_wrong_choices_are_refused(start, options, message):
    with pytest.raises(ValueError, match=message):
        start(**options)


def test_the_search_names_recoveries(start):
    config = start(recover__objective="sft+logits").config
    own = config_of(config, Setting(2, "lora+projector+sft+hidden", "none", 16))
    assert own.recover.train == ["lora", "projector"] and own.recover.objective == {"sft": 0.5, "hidden": 0.5}
    kept = config_of(config, Setting(2, "projector", "none", 16))
    assert kept.recover.train == ["projector"] and kept.recover.objective == {"sft": 0.5, "logits": 0.5}
    assert recover.describe(own.recover) == "lora+projector+sft+hidden, r = 16, alpha = 8"
    assert (
        recover.describe(kept.recover.model_copy(update={"fraction": 0.05})) == "projector+sft+logits, 5 % of the data"
    )


def test_a_patch_alone_and_before_training(start):
    """The maps leave less error than the cut; training starts from them; the card says both."""
    run = start(recover__train="patch")
    patched = recover.stage(run, pruned_stage(run), prepare.stage(run))
    run.make(patched)
    facts = run.facts(patched, PatchFacts)
    assert patched.kind == "patch" and facts["layers"] == [3] and facts["errors"][0] < 0.9
    both = start(recover__train="patch+lora")
    trained = recover.stage(both, pruned_stage(both), prepare.stage(both))
    both.make(trained)
    assert trained.parents[0] == patched and trained.kind == "recover"
    first = recover.LOSSES.read(both.folder_of(trained))[0]["loss"]
    plain = start(recover__train="lora")
    alone = recover.stage(plain, pruned_stage(plain), prepare.stage(plain))
    plain.make(alone)
    assert first < recover.LOSSES.read(plain.folder_of(alone))[0]["loss"]
    text = (both.folder_of(trained) / "README.md").read_text()
    assert "**Patched.** Linear maps" in text and "**Fine-tuned.**" in text and "train lora" in text
    whole = start(prune__layers=0, recover__train="patch")
    base = whole.base_model()
    assert recover.stage(whole, prune.stage(whole, base), prepare.stage(whole)) == base
    with pytest.raises(ValueError, match="The recovery patch needs a teacher"):
        recover.job(start(recover__train="patch"))


def test_the_command_patches_what_was_pruned_before(start, capsys):
    """jobs.recover on a pruned folder; after training there is nothing left to patch."""
    pruned = start().make(pruned_stage(start()))
    run = start(model__path=pruned, recover__train="patch", recover__teacher=str(DERM_TINY))
    recover.job(run)
    made = capsys.readouterr().out.split()[-1]
    assert "/patch-" in made and made != pruned
    trained = start(model__path=made, recover__train="lora")
    recover.job(trained)
    again = start(
        model__path=capsys.readouterr().out.split()[-1], recover__train="patch", recover__teacher=str(DERM_TINY)
    )
    with pytest.raises(ValueError, match=r"must directly follow the removal of layers, .* by patch, recover"):
        recover.job(again)


def test_a_teacher_that_fails_is_named(start, monkeypatch):
    def fail(self, *args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Teacher, "write_states", fail)
    run = start(recover__objective="hidden")
    with pytest.raises(RuntimeError, match=r"out of memory"):
        run.make(recover.stage(run, pruned_stage(run), prepare.stage(run)))


def test_leftovers_of_a_killed_merge_are_not_published(start):
    run = start()
    made = recover.stage(run, run.base_model(), prepare.stage(run))
    partial = run.store.root / f"{made.name}.partial"
    (partial / "tmp1").mkdir(parents=True)
    (partial / "tmp1" / "model.safetensors").write_bytes(b"half")
    (partial / "model-00001-of-00002.safetensors").write_bytes(b"half")
    run.make(made)
    assert not (run.folder_of(made) / "tmp1").exists()
    assert [path.name for path in run.folder_of(made).glob("*.safetensors")] == ["model.safetensors"]


def test_only_a_refusal_deletes_a_finished_training(start, monkeypatch):
    def die(self, *args):
        raise RuntimeError("the gate's process died")

    run = start()
    made = recover.stage(run, run.base_model(), prepare.stage(run))
    with monkeypatch.context() as patch:
        patch.setattr(Gate, "check", die)
        with pytest.raises(RuntimeError, match="process died"):
            run.make(made)
    assert (run.store.root / f"{made.name}.partial" / SNAPSHOTS).is_dir()

    def refuse(self, *args):
        raise GateError("wrong")

    with monkeypatch.context() as patch:
        patch.setattr(Gate, "check", refuse)
        with pytest.raises(verify.Refused, match="wrong"):
            run.make(made)
    assert not (run.store.root / f"{made.name}.partial").exists()


@pytest.mark.slow
def test_two_workers_share_a_training(tmp_path):
    """Through Ray Train, killed once: the losses and weights are those of one worker."""
    tables, weights = [], []
    for count in ("1", "2"):
        folder = tmp_path / count
        choices = {
            "recover.train": "lora",
            "recover.batch": "8",
            "recover.micro_batch": "3",
            "recover.checkpoint_every": "1",
            "replicas.count": count,
        }
        if count == "2":
            kill_after_a_snapshot("recover", options(folder, **choices), folder)
        made = command("recover", *options(folder, **choices))
        assert made.returncode == 0, made.stderr
        (artifact,) = folder.glob("artifacts/recover-*")
        tables.append(recover.LOSSES.read(artifact))
        weights.append(dict(iterate_tensors(artifact)))
        assert not (artifact / SNAPSHOTS).exists()
    assert len(tables[0]) == len(tables[1]) > 3
    for one, two in zip(*tables, strict=True):
        assert two == pytest.approx(one, rel=1e-4)
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-4)


def kill_after_a_snapshot(job: str, words: list[str], folder: Path) -> None:
    """Start a job, and kill its driver when the training has written a snapshot."""
    process = subprocess.Popen([sys.executable, "-m", f"jobs.{job}", "--config", CONFIG, *words], cwd=ROOT)
    while not list(folder.glob(f"**/{SNAPSHOTS}/snapshot.safetensors")):
        assert process.poll() is None, "the training ended before it was killed"
        time.sleep(0.05)
    process.kill()
    process.wait()
