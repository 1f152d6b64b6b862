"""A checkpoint that somebody brings, broken: every job refuses it in one sentence before it computes anything."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from actors.checkpoint.intake import Intake
from jobs import ablate, estimate, evaluate, prune, quantize, recover
from jobs.core.command import explain
from jobs.core.run import Run
from jobs.core.workers import Workers
from tests.breaking import breaks, removed, shard
from tests.jobs.commands import CONFIG, SMALL
from tests.jobs.here import Worker, run_here
from tests.tiny import save_tiny

JOBS = {
    "ablate": (ablate, {}),
    "prune": (prune, {"prune.order": "[1]", "prune.layers": "1"}),
    "recover": (recover, {}),
    "quantize": (quantize, {"quantize.method": "awq", "quantize.awq_search": "layerwise"}),
    "evaluate": (evaluate, {}),
    "estimate": (estimate, {"estimate.removed": "1", "estimate.quantizer": "none"}),
}


class Computing(Exception):
    """What a job raises here when it goes on to compute."""


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    for name, kind in (("source", "clip-llama"), ("other", "siglip-phi")):
        save_tiny(root / name, kind)
        shard(root / name)
    return root / "source", root / "other"


def one_run(monkeypatch, folder: Path, model: Path, **options):
    return run_here(monkeypatch, folder, model, config=CONFIG, **{**SMALL, "data.draw_per_class": "2", **options})


@pytest.mark.parametrize("step", [10, pytest.param(1, marks=pytest.mark.slow)])
def test_every_job_refuses_what_the_first_look_finds(models, monkeypatch, tmp_path, step):
    """The look itself is that of tests/actors/test_intake.py; here nothing but it may run, and its words arrive."""
    source, other = models
    looked: dict[str, str | None] = {}
    sentences = 0

    def worker(self, target, *_, **kwargs):
        if target != "actors.checkpoint.intake:Intake":
            raise Computing(target)
        return Remembering(target, **kwargs)

    class Remembering(Worker):
        def call(self, method, *args):
            if looked.get(name, "") == "":
                try:
                    Intake().look(*args)
                    looked[name] = None
                except ValueError as error:
                    looked[name] = str(error)
            if (said := looked[name]) is not None:
                raise ValueError(said)
            return {"completed": []}

    configs = {
        job: one_run(monkeypatch, tmp_path / "run", source, **options).config for job, (_, options) in JOBS.items()
    }
    monkeypatch.setattr(Workers, "worker", worker)
    monkeypatch.setattr(Workers, "replicas", lambda self, *_, **__: worker(self, "replicas"))
    monkeypatch.setattr(Workers, "count_workers", lambda self: 1)
    for number, (name, apply) in enumerate(list(breaks(other))[::step]):
        folder = shutil.copytree(source, tmp_path / f"copy-{number}")
        apply(folder)
        for job, (module, _) in JOBS.items():
            model = configs[job].model.model_copy(update={"path": str(folder)})
            try:
                module.job(Run(configs[job].model_copy(update={"model": model})))
                end = "done"
            except Computing:
                end = "computing"
            except Exception as error:
                end = explain(error) or f"traceback: {error!r}"
                assert not end.startswith("traceback"), (name, job, end)
                assert str(folder) in end and "\n" not in end and ".partial" not in end, (name, job, end)
                sentences += 1
            assert not (looked.get(name) and end in ("computing", "done")) or job == "estimate", (name, job, end)
        shutil.rmtree(folder)
    assert len(looked) >= 200 // step and sentences >= 900 // step


@pytest.mark.parametrize("job", ["ablate", "prune", "recover", "quantize", "evaluate"])
def test_a_model_without_chat_template_is_refused_first(models, monkeypatch, tmp_path, job):
    """By the user's path, and nothing is left behind."""
    folder = shutil.copytree(models[0], tmp_path / "mine")
    removed("chat_template.jinja")(folder)
    module, options = JOBS[job]
    with pytest.raises(ValueError, match=rf"'{folder}' has no chat template: add its chat_template\.jinja"):
        module.job(one_run(monkeypatch, tmp_path / "run", folder, **options))
    made = {path.parent.name.partition("-")[0] for path in (tmp_path / "run" / "artifacts").glob("*/manifest.json")}
    assert made <= {"data"}


@pytest.mark.parametrize("job", ["ablate", "prune", "recover", "quantize", "evaluate"])
def test_weights_that_are_no_numbers_are_named_by_the_users_file(models, monkeypatch, tmp_path, job):
    folder = shutil.copytree(models[0], tmp_path / "mine")
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors:
            if name.endswith("layers.3.mlp.up_proj.weight"):
                tensors[name][0, 0] = torch.nan
                broken = file
        save_file(tensors, file, metadata={"format": "pt"})
    module, options = JOBS[job]
    with pytest.raises(ValueError, match=rf"'{broken}' has NaN or infinite values in .*layers\.3\.mlp\.up_proj"):
        module.job(one_run(monkeypatch, tmp_path / "run", folder, **options))
