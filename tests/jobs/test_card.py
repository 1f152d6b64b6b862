"""The model card: the chain back to the source in its numbering, scores, commands that tell nothing private."""

import json
import re
import shutil
import sys
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from cluster.tables import write_table
from jobs import prune
from jobs.core.options import load_config
from jobs.core.stage import Source
from jobs.reporting import card
from tests.jobs.here import run_here
from tests.tiny import DERM_TINY

EVALUATION = {
    "metrics": {
        **{"images": 9, "answers": 27, "baseline_pct": 91.26, "baseline_interval_pct": [88.04, 95.55]},
        **{"exact_pct": 70.0, "name_accuracy": 80.0, "name_accuracy_interval": [61.0, 92.0]},
    },
    "profile": {
        **{"weight_bytes": 3 * 2**20, "peak_memory_bytes": 2**30, "peak_memory_kind": "process, resident"},
        **{"ms_per_token": 2.345, "ms_per_token_p5_p95": [2.1, 2.9], "first_token_ms": 21.34},
        **{"device": "CPU", "threads": 1},
    },
}


def front_matter(text: str) -> dict:
    _, front, _ = text.split("---\n", 2)
    return yaml.safe_load(front)


def pruned(monkeypatch, run_dir: Path, model, order: str) -> Path:
    run = run_here(monkeypatch, run_dir, model, prune__order=order, prune__layers=len(json.loads(order)))
    prune.job(run)
    return run.store.root / prune.stage(run, run.base_model()).name


@pytest.fixture
def twice(monkeypatch, tmp_path):
    """derm-tiny without 1 and 4, and that without its own 1 and 2."""
    first = pruned(monkeypatch, tmp_path / "run", DERM_TINY, "[4, 1]")
    return first, pruned(monkeypatch, tmp_path / "other", first, "[1, 2]")


def test_a_pruned_models_card(twice):
    """Every artifact has one; of layers pruned twice it gives the original numbers: 0 2 3 5 6 7 8 9 lose 2 and 3."""
    one, two = ((folder / card.CARD).read_text() for folder in twice)
    assert "Decoder layers 1, 4 were removed" in one and "8 are left" in one
    assert "1. **Pruned.** Decoder layers 1, 4 were removed" in two
    assert "2. **Pruned.** Decoder layers 2, 3 were removed" in two and "6 are left" in two
    assert two.count("Made by Prunella from `derm-tiny`.") == 1 and "Not for clinical use" in two
    assert "Licence of that model: apache-2.0." in two and "Not evaluated yet" in two
    assert "* names: as published by llava-hf" in two and "sums" not in two
    front = front_matter(two)
    assert front == {
        **{"license": "apache-2.0", "library_name": "transformers", "pipeline_tag": "image-text-to-text"},
        "tags": ["prunella", "llava", "pruned"],
    }


def test_scores_come_with_the_evaluation(twice):
    """Written into the card once there are some, and anew with the next; the name of the artifact stays."""
    before = (twice[1] / "manifest.json").read_bytes()
    for _ in range(2):
        card.refresh(twice[1], EVALUATION)
    text = (twice[1] / card.CARD).read_text()
    assert "| 91.3 [88.0, 95.5] | 80.0 [61.0, 92.0] | 70.0 | 3.00 MiB | 1024.00 MiB (process, resident)" in text
    assert "2.35 [2.10, 2.90] | 21.3 ms |" in text or "2.34 [2.10, 2.90] | 21.3 ms |" in text
    assert text.count("held-out images") == 1 and "Not evaluated yet" not in text
    assert "Measured on CPU, 1 thread(s)" in text
    assert (twice[1] / "manifest.json").read_bytes() == before
    assert not list(twice[1].glob("README.md.*"))
    unnamed = {**EVALUATION["metrics"], "name_accuracy": None, "name_accuracy_interval": None}
    card.refresh(twice[1], {**EVALUATION, "metrics": unnamed})
    assert "| - | 70.0 |" in (twice[1] / card.CARD).read_text()


JUDGED = {
    **{"judge": "/srv/private/Qwen2.5-32B", "judge_agreement": None, "judge_flagged": False, "judge_pct": 71.25},
    **{"judge_interval_pct": [60.0, 80.0], "judge_bounds_pct": [70.5, 72.5], "judge_scored": 26, "judge_total": 27},
}


def test_a_judges_scores_come_with_what_they_are_worth(tmp_path, monkeypatch):
    """Calibrated or not, how many are scored, flagged; without a judge nothing is said of what one may have said."""
    facts = {"gate": {"names": "fine"}}
    step = {"kind": "prune", "removed": [1], "left": 9, "chosen": "hand"}
    card.finish(run_here(monkeypatch, tmp_path), Source("model-1", "owner/llava", "c0ffee"), tmp_path, facts, step)
    (tmp_path / "manifest.json").write_text(json.dumps(facts))

    def said(*judged: dict) -> str:
        card.refresh(tmp_path, EVALUATION, *judged)
        return (tmp_path / card.CARD).read_text()

    text = said()
    assert "None of these numbers is an LLM judge's" in text and "Qwen2.5" not in text and "scored" not in text
    text = said(JUDGED)
    assert "LLM judge Qwen2.5-32B, uncalibrated" in text and "/srv" not in text and "Flagged" not in text
    assert "71.2 [60.0, 80.0] %; scored 26/27, between 70.5 and 72.5 %" in text
    text = said(JUDGED | {"judge_flagged": True, "judge_pct": None, "judge_interval_pct": None})
    assert text.index("**Flagged") < text.index("no headline") < text.index("scored 26/27") < text.index("Measured on")


def test_a_users_own_folder_is_left_alone(tmp_path):
    folder = shutil.copytree(DERM_TINY, tmp_path / "mine")
    card.refresh(folder, EVALUATION)
    assert (folder / card.CARD).read_bytes() == (DERM_TINY / card.CARD).read_bytes()
    card.refresh(Path("owner/name"), EVALUATION)


@pytest.mark.parametrize(
    ("text", "licence", "base"),
    [
        (None, None, None),
        ("# no front matter", None, None),
        ("---\nlicense: llama2\nbase_model: lmsys/vicuna-7b-v1.5\n---\nx", "llama2", "lmsys/vicuna-7b-v1.5"),
        ("---\n: : [\n---\nx", None, None),
    ],
)
def test_licence_of_the_source(tmp_path, monkeypatch, text, licence, base):
    folder = shutil.copytree(DERM_TINY, tmp_path / "mine")
    (folder / card.CARD).unlink()
    if text is not None:
        (folder / card.CARD).write_text(text)
    made = (pruned(monkeypatch, tmp_path / "run", folder, "[1]") / card.CARD).read_text()
    front = front_matter(made)
    assert front["license"] == (licence or "unknown") and front.get("base_model") == base
    assert f"Licence of that model: {licence or 'unknown: see the base model'}." in made


def test_a_hub_model(tmp_path, monkeypatch):
    """Named with its commit; base_model is its id."""
    run = run_here(monkeypatch, tmp_path)
    facts = {"gate": {"names": "fine"}}
    step = {"kind": "recover", "settings": {"rank": 16, "method": "qlora"}, "conversations": 117}
    step |= {"digest": "0123", "first_loss": 1.5, "last_loss": 0.25}
    card.finish(run, Source("model-1", "owner/llava", "c0ffee"), tmp_path, facts, step)
    text = (tmp_path / card.CARD).read_text()
    assert "Made by Prunella from `owner/llava` at commit `c0ffee`" in text
    assert front_matter(text)["base_model"] == "owner/llava"
    assert "method qlora, rank 16; 117 conversations (digest `0123`); loss 1.500 at the first step, 0.250" in text


@pytest.mark.parametrize(("simulated", "words"), [(True, "Simulated: the rounded weights"), (False, "the rest keeps")])
def test_a_quantized_model(tmp_path, monkeypatch, simulated, words):
    facts: dict = {"gate": {"names": "fine"}}
    step = {"kind": "quantize", "method": "rtn", "bits": 3, "bits_per_weight": 3.297, "simulated": simulated}
    step |= {"settings": {"bits": 3}, "calibration": {"conversations": 8, "digest": "beef"}}
    card.finish(run_here(monkeypatch, tmp_path), Source("model-1", str(DERM_TINY)), tmp_path, facts, step)
    text = (tmp_path / card.CARD).read_text()
    assert words in text and ("Simulated" in text) == simulated
    assert "have 3.30 bits a weight" in text and "Calibrated with 8 training conversations (digest `beef`)" in text
    assert front_matter(text)["tags"] == ["prunella", "llava", "quantized", "rtn", "3-bit"]


def test_the_command_tells_no_private_path(monkeypatch):
    words = ["--run_dir", "/home/me/secret/run", "--data.root=/data/x y/derm", "--model.path", "owner/name"]
    monkeypatch.setattr(sys, "argv", ["x", *words, "--prune.order", "[3, 10]", "--publish.to", "s3://bucket/a/b"])
    said = card.command()
    assert said.endswith("--run_dir /.../run --data.root=/.../derm --model.path owner/name --prune.order '[3, 10]' "
                         "--publish.to s3://bucket/a/b")  # fmt: skip
    assert "secret" not in said and "x y" not in said


def test_every_step_keeps_its_own_command_and_options(tmp_path, monkeypatch):
    """Pruned twice by two commands: both are in the second card, each with options that make its config again."""
    model, orders = DERM_TINY, {"one": [4, 1], "two": [2]}
    for name, order in orders.items():
        monkeypatch.setattr(sys, "argv", ["x", "--config", f"{tmp_path}/{name}.yaml", "--model.path", str(model)])
        run = run_here(monkeypatch, tmp_path / "run", model, prune__order=order, prune__layers=len(order))
        facts, folder = {"gate": {"names": "fine"}}, tmp_path / f"prune-{name}"
        folder.mkdir()
        step = {"kind": "prune", "removed": order, "left": 7, "chosen": "hand"}
        card.finish(run, Source("model-1", str(model)), folder, facts, step)
        (folder / "manifest.json").write_text(json.dumps(facts))
        model = folder
    text = (model / card.CARD).read_text()
    commands = re.findall(r"^Step (.), with prunella .*?\n```\n\S+ -m \S+ (.*?)\n```", text, re.MULTILINE | re.DOTALL)
    assert commands == [
        ("1", "--config /.../one.yaml --model.path /.../checkpoint"),
        ("2", "--config /.../two.yaml --model.path /.../prune-one"),
    ]
    assert str(tmp_path) not in text and str(DERM_TINY.parent) not in text
    blocks, default = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL), load_config(None, [])
    for block, parent, order in zip(blocks, ("checkpoint", "prune-one"), orders.values(), strict=True):
        (tmp_path / "again.yaml").write_text(block)
        again = load_config(str(tmp_path / "again.yaml"), [])
        assert again.model.path == f"/.../{parent}"
        assert again.prune == default.prune.model_copy(update={"layers": len(order), "order": order})
        assert again.model_copy(update={"model": default.model, "prune": default.prune}) == default


def test_options_are_what_differs_from_the_defaults(tmp_path):
    """A file's and the command's; nothing that changes no checkpoint, no words of the data, no path of this machine."""
    given = [("data.root", "/home/me/x y/derm"), ("quantize.method", "int8"), ("ablate.embedder", "/srv/e/minilm")]
    given += [("judge.url", "http://10.0.0.7:8000/v1"), ("run_dir", "/home/me/run"), ("replicas.gpus", "1")]
    config = load_config("configs/derm-tiny.yaml", given)
    found = card.options(config)
    assert found["ablate"]["embedder"] == "/.../minilm"
    assert not {"data", "judge", "run_dir", "replicas"} & set(found) and "seed" not in found
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(found))
    again = load_config(str(tmp_path / "again.yaml"), [given[2]])
    for section in ("seed", "model", "generation", "ablate", "prune", "recover", "quantize"):
        assert getattr(again, section) == getattr(config, section), section


def test_steps_of_one_command_stand_together(tmp_path):
    """And a step made by an older version, which kept no command, is not said to be made by its neighbours'."""
    source = {"kind": "source", "name": "x", "revision": None, "base": None, "licence": None}
    step = {"kind": "prune", "removed": [1], "left": 3, "chosen": "hand"}
    made = {"command": "python -m jobs.compress", "options": {"seed": 7}, "versions": {"prunella": "1.2"}}
    both = [{**step, "made": dict(made)}, {**step, "removed": [0], "made": dict(made)}]
    card.write(tmp_path, {"history": [source, step, *both], "gate": {"names": "y"}})
    text = (tmp_path / card.CARD).read_text()
    assert "Step 1: the command was not recorded." in text and "Steps 2, 3, with prunella 1.2:" in text
    assert text.count("python -m jobs.compress") == text.count("seed: 7") == 1


def test_conversations_digest(tmp_path):
    """It depends on the image's bytes, the question, the answer and the order, not on where the image lies."""

    def made(name: str, **changes) -> str:
        rows = [
            {
                "sample_id": f"s{i}",
                "split": "train",
                "image": f"/{name}",
                "sha256": f"h{i}",
                "question": "q",
                "reference": "r",
            }
            for i in range(3)
        ]
        rows[1].update(changes)
        folder = tmp_path / name
        folder.mkdir()
        write_table(folder / "conversations.parquet", rows)
        return str(folder)

    first = card.conversations_digest(made("a"), ["s0", "s1"])
    assert card.conversations_digest(made("b"), ["s0", "s1"]) == first
    assert card.conversations_digest(made("c"), ["s1", "s0"]) != first
    for number, change in enumerate(({"sha256": "x"}, {"question": "x"}, {"reference": "x"})):
        assert card.conversations_digest(made(f"d{number}", **change), ["s0", "s1"]) != first


@pytest.mark.parametrize(("method", "loader"), [("hqq", "this loader"), ("nf4", "plain transformers")])
def test_the_card_says_what_loaded_it(tmp_path, method, loader):
    """HQQ's format is Prunella's own: neither is plain transformers offered, nor said to have loaded it."""
    source = {"kind": "source", "name": "x", "revision": None, "base": None, "licence": None}
    step = {"kind": "quantize", "method": method, "settings": {}, "bits_per_weight": 4.5, "simulated": False}
    history = [source, {**step, "bits": 4, "calibration": None}]
    card.write(tmp_path, {"history": history, "gate": {"names": "y"}})
    text = (tmp_path / card.CARD).read_text()
    assert f"It was loaded by {loader} in a fresh process" in text
    assert ("AutoModelForImageTextToText" in text) == (method == "nf4") == ("plain transformers" in text)
    assert ("Only Prunella reads this format" in text) == (method == "hqq")
    imports = re.findall(r"^from (\S+) import (.+)$", text, re.MULTILINE)
    assert imports and all(hasattr(import_module(module), n) for module, ns in imports for n in ns.split(", "))
