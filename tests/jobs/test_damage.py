"""Files in run_dir that were cut or changed behind our back: seen when they are used, named, made again or refused."""

import json
from pathlib import Path

import pytest

from cluster import artifacts
from cluster.tables import PartTable, read_table, write_table
from jobs import evaluate, prepare, prune
from jobs.core.facts import EvaluateFacts
from jobs.reporting.summary import SUMMARY
from jobs.searching.table import ROWS
from tests.jobs.commands import CONFIG, SMALL
from tests.jobs.here import run_here
from tests.tiny import DERM_TINY


@pytest.fixture(autouse=True)
def another_process(monkeypatch):
    """What this process has compared is forgotten: as if each run were a process of its own."""
    monkeypatch.setattr(artifacts.ArtifactStore, "_whole", set())


def flip(path: Path, place: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)


def pruned_run(monkeypatch, folder: Path):
    options = {**SMALL, "data.draw_per_class": "2", "prune.order": "[4, 5]", "evaluate.limit": "2"}
    return run_here(monkeypatch, folder, DERM_TINY, config=CONFIG, **options)


def test_a_flipped_byte_in_weights_is_not_evaluated(monkeypatch, tmp_path, capsys):
    """The evaluation is gone and is made again, from a checkpoint of which one bit is wrong: that is made first."""
    run = pruned_run(monkeypatch, tmp_path)
    model, data = prune.stage(run, run.base_model()), prepare.stage(run)
    evaluated = evaluate.stage(run, model, data)
    run.make(evaluated)
    before = run.facts(evaluated, EvaluateFacts)["metrics"]
    weights = run.folder_of(model) / "model.safetensors"
    whole = weights.read_bytes()
    flip(weights)
    run.store.remove(evaluated.name)
    monkeypatch.setattr(artifacts.ArtifactStore, "_whole", set())
    again = pruned_run(monkeypatch, tmp_path)
    capsys.readouterr()
    again.make(evaluated)
    said = capsys.readouterr().err
    assert (
        f"{model.name} is damaged, and is made again where it is needed: model.safetensors has another SHA-256" in said
    )
    assert f"prune: computing {model.name}" in said
    assert weights.read_bytes() == whole and again.facts(evaluated, EvaluateFacts)["metrics"] == before


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x"), "model.safetensors has 1 bytes instead of"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda folder: (folder / "manifest.json").write_text('{"name": "pru'), "manifest.json cannot be read"),
    ],
)
def test_what_is_cut_is_seen_at_once(monkeypatch, tmp_path, capsys, spoil, words):
    """Also by what only looks which stages are there."""
    run = pruned_run(monkeypatch, tmp_path)
    model = prune.stage(run, run.base_model())
    folder = Path(run.make(model))
    assert run.missing([model]) == []
    spoil(folder)
    assert run.missing([model]) == [model] and not folder.exists()
    assert words in capsys.readouterr().err


def test_a_damaged_artifact_as_model_path_is_refused(monkeypatch, tmp_path):
    run = pruned_run(monkeypatch, tmp_path)
    folder = Path(run.make(prune.stage(run, run.base_model())))
    flip(folder / "model.safetensors")
    with pytest.raises(ValueError, match=rf"model\.path '{folder}' is damaged: model\.safetensors has another SHA-256"):
        run_here(monkeypatch, tmp_path / "other", folder).base_model()


def test_a_card_may_change(monkeypatch, tmp_path):
    run = pruned_run(monkeypatch, tmp_path)
    model = prune.stage(run, run.base_model())
    (Path(run.make(model)) / "README.md").write_text("scores")
    monkeypatch.setattr(artifacts.ArtifactStore, "_whole", set())
    assert run.store.verify(model.name)


def test_artifacts_of_older_code_pass(monkeypatch, tmp_path):
    run = pruned_run(monkeypatch, tmp_path)
    model = prune.stage(run, run.base_model())
    manifest = Path(run.make(model)) / "manifest.json"
    content = json.loads(manifest.read_text())
    assert content.pop("files")["config.json"][0] > 0
    manifest.write_text(json.dumps(content))
    monkeypatch.setattr(artifacts.ArtifactStore, "_whole", set())
    assert run.store.verify(model.name)


def test_a_unit_that_is_damaged_is_done_again(tmp_path, capsys):
    """Measurements and verdicts: a cut file and one with a flipped bit are removed; the others' rows stay."""
    table = PartTable(tmp_path)
    for unit in ("a", "b", "c"):
        table.add(unit, [{"unit": unit, "value": number * 0.37, "text": f"{unit} {number}"} for number in range(500)])
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    flip(tmp_path / "b.parquet", 0.3)
    assert {row["unit"] for row in table.all_rows()} == {"c"}
    said = capsys.readouterr().err
    assert f"{tmp_path / 'a.parquet'} is damaged" in said and f"{tmp_path / 'b.parquet'} is damaged" in said
    assert table.finished() == {"c"}


def test_every_flipped_bit_of_a_table_is_seen(tmp_path):
    """In pages by their checksums; elsewhere the file does not read, or reads the same rows."""
    rows = [{"value": number * 0.37, "text": f"row {number}"} for number in range(200)]
    path = tmp_path / "a.parquet"
    write_table(path, rows)
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        try:
            assert read_table(path) == rows, place
        except Exception:
            continue


@pytest.mark.parametrize("rows", [SUMMARY, ROWS], ids=str)
def test_json_that_was_cut_is_named(tmp_path, rows):
    (tmp_path / rows).write_text('[{"method": ')
    with pytest.raises(ValueError, match=rf"{tmp_path / rows} is damaged .*: remove it"):
        rows.read(tmp_path)
