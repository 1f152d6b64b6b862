"""The estimate as a user runs it, and what it says when something is wrong."""

import json
import shutil
from pathlib import Path

import pytest

from jobs import estimate
from jobs.core.command import parse
from jobs.core.run import Run
from tests.jobs.commands import ROOT, assert_says, run
from tests.tiny import DERM_TINY

SEVEN_B = ("--config", str(ROOT / "configs/llava-1.5-7b-dermnet.yaml"))


@pytest.fixture(autouse=True)
def _without_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def printed(capsys, tmp_path: Path, *arguments: str) -> str:
    with Run(parse([*arguments, "--run_dir", str(tmp_path)], estimate.SHORTHANDS)) as made:
        estimate.job(made)
    return capsys.readouterr().out


def found(capsys, tmp_path: Path, *arguments: str) -> list[dict]:
    return [json.loads(line) for line in printed(capsys, tmp_path, *arguments, "--json").splitlines()]


@pytest.mark.slow
def test_the_command_without_network(tmp_path):
    """As the documentation spells it, on a machine that has neither the model nor the hub: one object, nothing else."""
    result = run("estimate", *SEVEN_B, "--removed", "7", "--quantizer", "awq", "--json", "--run_dir", str(tmp_path))
    assert result.returncode == 0, result.stderr
    row = json.loads(result.stdout)
    assert row["params"] == 5_646_743_552 and row["removed"] == 7 and row["removed_layers"] is None
    sizes = [row[f"{part}_gib"] for part in ("weight", "kv_cache", "activation")]
    assert row["total_gib"] == pytest.approx(sum(sizes), abs=2e-6) and row["device_gib"] == row["total_gib"]
    assert sizes[0] == pytest.approx(3.634068) == pytest.approx(sum(row["weight_parts_gib"].values()), abs=5e-6)
    assert sizes[1] == pytest.approx(25 * 2 * 4096 * 263 * 2 / 2**30, abs=1e-6)
    image = row["total_with_image_gib"] - row["total_gib"]
    assert image == pytest.approx(25 * 2 * 4096 * 576 * 2 / 2**30, rel=0.1)
    told = row["assumptions"]
    assert (told["group_size"], told["batch"], told["context"], told["decode_tokens"]) == (64, 1, 64, 200)
    assert told["cuda_context_gib"] == 0.5 and told["architecture"].endswith("llava-1.5-7b-hf/config.json")


def test_every_combination_is_a_row(capsys, tmp_path):
    rows = found(capsys, tmp_path, *SEVEN_B, "--removed", "[0, 9, [23, 4]]", "--quantizer", "[none, awq, int8]")
    assert [(r["removed"], r["quantizer"], r["bits"]) for r in rows] == [
        (count, method, bits) for count in (0, 9, 2) for method, bits in (("none", 16), ("awq", 4), ("int8", 8))
    ]
    assert rows[-1]["removed_layers"] == [4, 23]
    assert rows[0]["weight_gib"] > rows[2]["weight_gib"] > rows[1]["weight_gib"] > rows[4]["weight_gib"]
    wider = found(capsys, tmp_path, *SEVEN_B, "--removed", "0", "--quantizer", "none", "--estimate.batch", "4")
    assert wider[0]["kv_cache_gib"] == pytest.approx(4 * rows[0]["kv_cache_gib"], abs=5e-6)


def test_the_table(capsys, tmp_path):
    """Simulated bits are marked; several GPUs add a column; the config's depth and quantizer are the default."""
    text = printed(capsys, tmp_path, *SEVEN_B, "--quantize.bits", "3", "--estimate.devices", "2")
    head, line, note, *_ = text.splitlines()
    assert head.split()[-2:] == ["fullest", "GPU"] and line.split()[:3] == ["7", "awq", "3*"] and note.startswith("*")
    assert float(line.split()[-1]) < float(line.split()[-2])


def test_the_own_model_and_its_config_alone(capsys, tmp_path):
    """derm-tiny's folder, and a lone copy of its config.json, give the same; a folder's own config.json is read."""
    shutil.copy(DERM_TINY / "config.json", tmp_path / "any.json")
    own = found(capsys, tmp_path / "run", "--model.path", str(DERM_TINY), "--removed", "2", "--quantizer", "rtn")
    alone = found(
        capsys,
        tmp_path / "run",
        *("--model.path", "some/where", "--estimate.architecture", str(tmp_path / "any.json")),
        *("--removed", "2", "--quantizer", "rtn"),
    )
    assert {**own[0], "assumptions": 0} == {**alone[0], "assumptions": 0}
    given = found(capsys, tmp_path / "run", *SEVEN_B, "--model.path", str(DERM_TINY), "--removed", "2")
    assert given[0]["params"] == own[0]["params"] < 2e6


def test_half_the_width(capsys, tmp_path):
    rows = [found(capsys, tmp_path, *SEVEN_B, "--removed", "0", "--estimate.width", w)[0] for w in ("1", "0.5")]
    assert rows[1]["kv_cache_gib"] == pytest.approx(rows[0]["kv_cache_gib"] / 2, abs=1e-6)
    assert rows[1]["params"] < 0.6 * rows[0]["params"]


MISTAKES = [
    (["--quantizer", "gptq"], ["'gptq'", "awq"]),
    (["--removed", "32"], ["32 layers", "at least one must stay"]),
    (["--removed", "-1"], ["-1"]),
    (["--removed", "[[40]]"], ["Layer 40", "0 to 31"]),
    (["--removed", "3", "--prune.order", "[1, 2]"], ["prune.order names 2 layers, but 3"]),
    (["--quantize.group_size", "48"], ["4096 inputs", "quantize.group_size"]),
    (["--quantizer", "hqq", "--quantize.bits", "16"], ["hqq has 2 or 3 or 4 or 8 bits"]),
    (["--estimate.context", "100"], ["576 tokens", "estimate.context"]),
    (["--estimate.architecture", "/no/config.json"], ["'/no/config.json'", "estimate.architecture"]),
    (["--model.path", "nobody/nothing"], ["'nobody/nothing'", "--estimate.architecture FILE"]),
    (["--model.path", "/no/where"], ["'/no/where'", "--estimate.architecture FILE"]),
]


@pytest.mark.parametrize(("arguments", "words"), MISTAKES)
def test_mistakes(arguments, words, capsys, tmp_path):
    with pytest.raises(ValueError) as caught:
        printed(capsys, tmp_path, *SEVEN_B, *arguments)
    message = str(caught.value)
    assert all(word in message for word in words) and "\n" not in message, message


@pytest.mark.slow
def test_a_mistake_is_one_sentence(tmp_path):
    assert_says(run("estimate", *SEVEN_B, "--removed", "40", "--run_dir", str(tmp_path)), "40 layers", "has 32")


def test_a_broken_config_json(capsys, tmp_path):
    file = tmp_path / "config.json"
    for text, word in (("{", "config.json"), ('{"model_type": "llama"}', "'llama' is not a LLaVA's")):
        file.write_text(text)
        with pytest.raises(ValueError, match=word):
            printed(capsys, tmp_path / "run", *SEVEN_B, "--estimate.architecture", str(file))
