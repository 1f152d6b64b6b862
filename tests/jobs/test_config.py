"""The configuration: files, overrides, help, and what is said of a mistake."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

from actors.derm_tiny.sentences import QUESTIONS
from jobs.config.schema import Config
from jobs.core import command
from jobs.core.options import fields, load_config, valid_keys

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def test_there_are_configs():
    assert {"derm-tiny.yaml", "llava-1.5-7b-dermnet.yaml", "judge-qwen2.5-32b.yaml"} <= {path.name for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_parses_and_answers_every_question(path):
    config = load_config(str(path), [])
    if path.name.startswith("judge-"):
        assert config.judge.engine != "none" and not config.data.classes
        return
    assert len(config.data.classes) == (1 if path.name == "smol-easy-vqa.yaml" else 8)
    for question in config.data.questions:
        for kind in config.data.classes:
            if question.answer:
                assert question.answer.format(name=kind.name, **kind.texts)


def test_the_paper_config_is_the_papers():
    config = load_config(str(CONFIGS[0].parent / "llava-1.5-7b-dermnet.yaml"), [])
    assert config.model.path == "llava-hf/llava-1.5-7b-hf"
    assert (config.model.dtype, config.replicas.gpus) == ("float16", 1)
    assert (config.recover.train, config.recover.rank, config.recover.alpha) == (["qlora"], 16, 8)
    assert (config.quantize.bits, config.quantize.group_size) == (4, 64)


def test_derm_smol_is_asked_what_it_was_trained_on():
    config = load_config(str(CONFIGS[0].parent / "derm-smol.yaml"), [])
    assert {question.id: question.text for question in config.data.questions} == QUESTIONS


def test_overrides_reach_nested_fields_and_keep_the_rest():
    config = load_config(None, [("prune.layers", "7"), ("recover.learning_rate", "2e-4"), ("prune.order", "[23, 4]")])
    assert config.prune.layers == 7
    assert config.recover.learning_rate == 2e-4
    assert config.prune.order == [23, 4]
    assert config.generation.max_new_tokens == 200


def test_command_line_forms():
    config = command.parse(["--prune.layers=3", "--run-dir", "/tmp/x", "--replicas.count", "auto"])
    assert (config.prune.layers, config.run_dir, config.replicas.count) == (3, "/tmp/x", "auto")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([("prune.layer", "7")], ["prune.layer", "did you mean 'prune.layers'"]),
        ([("quantise.method", "awq")], ["quantise", "did you mean 'quantize"]),
        ([("prune.layers", "many")], ["prune.layers", "many"]),
        ([("replicas.count", "none")], ["replicas.count", "none"]),
        ([("replicas.gpus", "1.5")], ["replicas.gpus is 1.5", "a fraction below 1", "1, 2, ..."]),
        ([("quantize.method", "gptq")], ["quantize.method", "awq", "gptq"]),
        ([("data.classes", "[{nam: rosacea}]")], ["data.classes.0.nam", "data.classes.0.name"]),
        ([("seed.value", "1")], ["seed"]),
        ([("data.test_fraction", "1.5")], ["data.test_fraction", "1.5"]),
    ],
)
def test_mistakes_are_named(overrides, words):
    with pytest.raises(ValueError) as error:
        load_config(None, overrides)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("text", "word"), [("a: [", "not valid YAML"), ("- 1\n- 2", "not a mapping"), ("prune: {layrs: 2}", "prune.layers")]
)
def test_broken_files_are_named(tmp_path, text, word):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=word.replace(".", r"\.")):
        load_config(str(path), [])


def test_missing_file_is_named():
    with pytest.raises(ValueError, match=r"nowhere\.yaml.*configs/"):
        load_config("nowhere.yaml", [])


@pytest.mark.parametrize(("arguments", "word"), [(["prune"], "prune"), (["--prune.layers"], "lacks a value")])
def test_wrong_arguments_are_named(arguments, word):
    with pytest.raises(ValueError, match=word):
        command.parse(arguments)


def test_help_lists_every_field_with_default_and_unit(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["job", "--help"])
    command.main("What the job does.", test_help_lists_every_field_with_default_and_unit)
    shown = capsys.readouterr().out
    assert all(f"--{key} " in shown for key in valid_keys())
    assert all(description for *_, description in fields())
    assert "longest answer [tokens] (default: 200)" in shown


def test_text_fields_are_taken_as_they_are():
    config = load_config(None, [("model.revision", "12e4567"), ("run_dir", "2026-11-22"), ("data.root", "null")])
    assert (config.model.revision, config.run_dir, config.data.root) == ("12e4567", "2026-11-22", None)


def test_help_describes_the_lists_too(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["job", "--help"])
    command.main("What the job does.", test_help_describes_the_lists_too)
    shown = capsys.readouterr().out
    assert "  data.classes[].match YAML" in shown and "  data.questions[].answer STR" in shown
    assert "--data.classes[]" not in shown


def test_a_reader_that_has_seen_enough_of_the_help_is_no_error():
    code = "import sys; sys.argv[1:] = ['--help']; from jobs.core import command; command.main('Doc.', command.main)"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_search_over_sets_needs_a_criterion_that_is_measured_on_sets():
    options = [("prune.search", "greedy"), ("ablate.criterion", "magnitude+")]
    with pytest.raises(ValueError, match=r"prune\.search greedy .* magnitude\+ cannot: choose answer_similarity"):
        load_config(None, options)
    assert load_config(None, [("prune.search", "greedy"), ("ablate.criterion", "kl")]).ablate.criterion == "kl"


def test_a_config_that_is_no_text(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"seed: 1\xff")
    with pytest.raises(ValueError, match=r"The config '.*a\.yaml' is not text in UTF-8"):
        load_config(str(tmp_path / "a.yaml"), [])


@pytest.mark.parametrize("seed", ["-1", "4294967296"])
def test_a_seed_has_bounds(seed):
    with pytest.raises(ValueError, match=rf"Config key 'seed': Input should be .*\(given: {seed}\)"):
        load_config(None, [("seed", seed)])


def test_every_number_has_a_bound():
    """A number without one is a mistake that only shows hours later."""

    def numbers(section, prefix=""):
        for name, field in section.model_fields.items():
            kind = field.annotation
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from numbers(kind, f"{prefix}{name}.")
            elif re.search(r"\b(int|float)\b", str(kind)) and "Annotated" not in str(kind) and not field.metadata:
                yield prefix + name

    layers = {"ablate.candidates", "prune.order", "estimate.removed"}  # checked against the model's layers
    assert {name for name in numbers(Config) if not name.endswith("dtype")} == layers


def test_a_base_gives_what_the_file_lacks(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "base.yaml").write_text("seed: 3\nprune: {layers: 4, width: 0.5}\nsearch: {depths: [1]}\n")
    (tmp_path / "own.yaml").write_text("base: below/base.yaml\nprune: {layers: 6}\nsearch: {depths: [2, 3]}\n")
    config = load_config(str(tmp_path / "own.yaml"), [("prune.beam_width", "9")])
    assert (config.seed, config.prune.layers, config.prune.width, config.prune.beam_width) == (3, 6, 0.5, 9)
    assert config.search.depths == [2, 3]
    (tmp_path / "below" / "base.yaml").write_text("base: ../own.yaml\n")
    with pytest.raises(ValueError, match="is based on it"):
        load_config(str(tmp_path / "own.yaml"), [])
    (tmp_path / "own.yaml").write_text("base: gone.yaml\n")
    with pytest.raises(ValueError, match="Cannot read the config"):
        load_config(str(tmp_path / "own.yaml"), [])
