"""The quantize stage: only settings that decide the artifact name it, and what cannot work is refused at once."""

import pytest

from jobs import quantize
from jobs.options import load_config
from jobs.run import Run, Stage
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
    """The base model's config.json is enough: there are no weights here to load."""
    tiny_config("clip-phi").save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="does not know the decoder layers of 'phi'"):
        name(tmp_path / "run", model=str(tmp_path / "model"))
    assert name(tmp_path / "run", model=str(tmp_path / "model"), **{"quantize.method": "rtn"}).startswith("quantize-")
