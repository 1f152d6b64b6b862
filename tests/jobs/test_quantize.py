"""The quantize stage: only settings that decide the artifact name it, and what cannot work is refused at once."""

from pathlib import Path

import pytest
import torch

from jobs import prepare, quantize
from jobs.core.options import load_config
from jobs.core.run import Run
from jobs.core.stage import Stage
from jobs.core.workers import Workers
from tests.jobs.here import Worker
from tests.tiny import DERM_TINY, tiny_config


def run_with(folder, model: str = str(DERM_TINY), **options) -> Run:
    given = {"run_dir": str(folder), "model.path": model, **options}
    return Run(load_config(None, [(key.replace("__", "."), value) for key, value in given.items()]))


def stage(run: Run):
    return quantize.stage(run, run.base_model(), Stage("prepare", 1, {}, (), lambda *_: None))


def name(folder, **options) -> str:
    return stage(run_with(folder, **options)).name


@pytest.mark.parametrize(
    ("method", "decides", "does_not"),
    [
        ("awq", ["group_size", "bits", "clip", "awq_search", "calibration_samples", "seed"], []),
        ("rtn", ["group_size", "bits"], ["clip", "awq_search", "calibration_samples", "seed"]),
        ("hqq", ["group_size", "bits"], ["clip", "awq_search", "calibration_samples", "seed"]),
        ("nf4", [], ["clip", "awq_search", "calibration_samples", "seed"]),
        ("int8", [], ["group_size", "clip", "awq_search", "calibration_samples", "seed"]),
    ],
)
def test_the_recipe_holds_what_decides(tmp_path, method, decides, does_not):
    other = {
        **{"group_size": "32", "bits": "8", "clip": "false", "awq_search": "layerwise", "calibration_samples": "5"},
        "seed": "1",
    }

    def changed(key: str) -> str:
        option = key if key == "seed" else f"quantize.{key}"
        return name(tmp_path, **{"quantize.method": method, option: other[key]})

    plain = name(tmp_path, **{"quantize.method": method})
    assert all(changed(key) != plain for key in decides)
    assert all(changed(key) == plain for key in does_not)


def test_methods_have_their_own_bits(tmp_path):
    """int8 has 8, none 16, the others 4, unless the config says otherwise."""
    bits = {
        method: run_with(tmp_path, **{"quantize.method": method}).config.quantize.bits
        for method in ("awq", "nf4", "rtn", "hqq", "int8", "none")
    }
    assert bits == {"awq": 4, "nf4": 4, "rtn": 4, "hqq": 4, "int8": 8, "none": 16}
    assert run_with(tmp_path, **{"quantize.method": "hqq", "quantize.bits": "3"}).config.quantize.bits == 3


def test_none_is_the_model_itself(tmp_path):
    run = run_with(tmp_path, **{"quantize.method": "none"})
    assert stage(run) == run.base_model()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "nf4", "bits": "8"}, r"nf4 has 4 bits; quantize\.bits is 8"),
        ({"method": "int8", "bits": "4"}, r"int8 has 8 bits; quantize\.bits is 4: set it to 8"),
        ({"method": "nf4", "group_size": "32"}, r"nf4 has blocks of 64"),
        ({"method": "rtn", "group_size": "48"}, r"rtn cannot round .* in groups of 48"),
    ],
)
def test_refused_when_the_stage_is_planned(tmp_path, options, words):
    """No stage is computed and no Ray is started before the message."""
    with pytest.raises(ValueError, match=words):
        name(tmp_path, **{f"quantize.{key}": value for key, value in options.items()})


def test_awq_and_phi(tmp_path):
    """autoawq's search is refused, ours is not. The base model's config.json is enough: there are no weights here."""
    tiny_config("clip-phi").save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"does not support the decoder layers of 'phi'.*awq_search layerwise"):
        name(tmp_path / "run", model=str(tmp_path / "model"))
    planned = name(tmp_path / "run", model=str(tmp_path / "model"), **{"quantize.awq_search": "layerwise"})
    assert planned.startswith("quantize-")


@pytest.mark.parametrize(
    ("options", "room", "expected"),
    [
        ({}, {}, 1),
        ({"count": "2"}, {(1, 0): 5}, 2),
        ({"count": "8"}, {(1, 0): 5}, 5),  # a private Ray does not grow
        ({"gpus": "1", "cpus": "4"}, {(4, 1): 3}, 3),
        ({"gpus": "2"}, {(1, 1): 4}, 4),  # each searches on a GPU of its own
        ({"gpus": "0.5", "count": "3"}, {(1, 1): 4}, 2),
        ({"gpus": "1"}, {(1, 1): 0}, 1),
    ],
)
def test_how_many_share_the_search(tmp_path, monkeypatch, options, room, expected):
    """One worker on a CPU unless replicas are counted; with GPUs as many as the replicas' GPUs."""
    monkeypatch.setattr(Workers, "connect", lambda _: None)
    monkeypatch.setattr("cluster.connection.room", lambda cpus, gpus: room[cpus, gpus])
    run = run_with(tmp_path, **{f"replicas.{key}": value for key, value in options.items()})
    assert run.workers.count_workers() == expected


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.usefixtures("private_ray", "one_thread")
def test_two_workers_of_which_each_is_killed_once(tmp_path, monkeypatch, capsys):
    """Bit for bit one worker's checkpoint; no finished layer is searched again, nor by a job that goes on."""
    real = Workers.worker

    def worker(self, target, count=1, **kwargs):
        return real(self, target, count, **kwargs) if count > 1 else Worker(target, **kwargs)

    monkeypatch.setattr(Workers, "connect", lambda _: None)
    monkeypatch.setattr(Workers, "worker", worker)

    def made(folder: Path, quantizer: str, **options) -> Path:
        monkeypatch.setattr(quantize, "QUANTIZER", quantizer)
        given = {"quantize.awq_search": "layerwise", "quantize.calibration_samples": "4", "data.draw_per_class": "4"}
        given = {"run_dir": str(folder), "data.root": str(tmp_path / "images"), **given, **options}
        run = Run(load_config("configs/derm-tiny.yaml", list(given.items())))
        return Path(run.make(quantize.stage(run, run.base_model(), prepare.stage(run))))

    alone = made(tmp_path / "alone", quantize.QUANTIZER)
    with pytest.raises(OSError, match="No space left"):
        made(tmp_path / "shared", "tests.quantizing:Unfinished", **{"replicas.count": "2"})
    notes = [path.name.split("-") for path in (tmp_path / "shared" / "notes").iterdir()]
    assert sorted(part for part, *_ in notes) == ["0"] * 6 + ["1"] * 6, "five layers each, one of them begun twice"
    assert len({process for _, process, _ in notes}) >= 3, "nobody was killed"
    shared = made(tmp_path / "shared", "tests.quantizing:Mortal", **{"replicas.count": "2"})
    assert len(list((tmp_path / "shared" / "notes").iterdir())) == 12
    assert (shared / "model.safetensors").read_bytes() == (alone / "model.safetensors").read_bytes()
    assert {p.name for p in shared.iterdir()} == {p.name for p in alone.iterdir()}
    assert not list(shared.parent.glob("*.partial"))
