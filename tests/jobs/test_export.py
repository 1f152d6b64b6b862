"""jobs.export: files, card, licence and record; the check runs where llama.cpp is installed."""

import importlib.util
import json
import shutil
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch

from actors.checkpoint.tensors import iterate_tensors
from actors.export.formats import FORMATS
from actors.export.gguf_export import MMPROJ
from actors.export.gguf_text import interleave
from actors.maths.rounding import dequantize, unpack
from cluster.artifacts import MANIFEST
from jobs import export, make_derm_smol, prune, quantize, verify
from jobs.core.options import load_config
from tests.jobs.here import run_here
from tests.tiny import DERM_TINY

SMALL = {"data__draw_per_class": 5, "export__questions": 3, "export__tokens": 6}
needs_llama_cpp = pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed")


def exported(monkeypatch, folder, model=DERM_TINY, **options):
    run = run_here(monkeypatch, folder / "run", model, "configs/derm-tiny.yaml", **{**SMALL, **options})
    export.job(run)
    return run.store.root / export.stage(run, run.base_model()).name


def lack_llama_cpp(monkeypatch) -> None:
    monkeypatch.setitem(FORMATS, "gguf", replace(FORMATS["gguf"], package="no_such_package"))


@needs_llama_cpp
def test_a_pruned_checkpoint(monkeypatch, tmp_path, capsys):
    """Its answers are transformers'; the card has both steps and the licence of the source; nothing is made twice."""
    pruning = run_here(monkeypatch, tmp_path / "run", prune__order="[2, 5]", prune__layers=2)
    pruned = pruning.make(prune.stage(pruning, pruning.base_model()))
    folder = exported(monkeypatch, tmp_path, pruned, export__type="F16")
    assert f"export: the files are in {folder}" in capsys.readouterr().out
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["agreement"]["same_answers"] == 1 and manifest["agreement"]["first_token_nats"] < 0.05
    assert manifest["sizes"].keys() == {MMPROJ, "model-F16.gguf"}
    card = (folder / "README.md").read_text()
    for words in (
        "license: apache-2.0",
        "library_name: gguf",
        "**Pruned.**",
        "2. **Exported**",
        "llama-server",
        "nats",
    ):
        assert words in card
    assert gguf.GGUFReader(folder / "model-F16.gguf").fields["llama.block_count"].contents() == 8
    changed = (folder / MANIFEST).stat().st_mtime_ns
    assert exported(monkeypatch, tmp_path, pruned, export__type="F16") == folder
    assert (folder / MANIFEST).stat().st_mtime_ns == changed


@needs_llama_cpp
def test_refused_where_the_answers_differ(monkeypatch, tmp_path):
    with pytest.raises(verify.Refused, match=r"is refused: .* nats .*try --export.class_token last"):
        exported(monkeypatch, tmp_path, export__type="F16", export__class_token="first")


def test_without_the_package_the_record_says_so(monkeypatch, tmp_path):
    """With the remedy, in the manifest and on the card; licences come along."""
    lack_llama_cpp(monkeypatch)
    model = shutil.copytree(DERM_TINY, tmp_path / "model")
    (model / "LICENSE.txt").write_text("Apache-2.0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FORMATS, "gguf", replace(FORMATS["gguf"], writer="no_such_writer"))
        with pytest.raises(ValueError, match="no_such_writer, which writes gguf files, is missing: pip install gguf"):
            exported(monkeypatch, tmp_path, model)
    folder = exported(monkeypatch, tmp_path, model)
    assert json.loads((folder / MANIFEST).read_text())["checked"].startswith(
        "not run (no_such_package is not installed: pip"
    )
    assert "not run (no_such_package is not installed" in (folder / "README.md").read_text()
    assert (folder / "LICENSE.txt").read_text() == "Apache-2.0"


@needs_llama_cpp
def test_the_check_runs_once_the_package_is_there(monkeypatch, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        lack_llama_cpp(patch)
        unchecked = exported(patch, tmp_path)
    checked = exported(monkeypatch, tmp_path)
    assert checked != unchecked != exported(monkeypatch, tmp_path, export__questions=2)
    assert "agreement" in json.loads((checked / MANIFEST).read_text())


def test_awq_codes_are_not_rounded_again(monkeypatch, tmp_path):
    """Q4_1 holds what the checkpoint computes with; Q4_0 would round it again, and is refused with what would do."""
    lack_llama_cpp(monkeypatch)
    rounding = run_here(monkeypatch, tmp_path / "run", config="configs/derm-tiny.yaml", quantize__method="rtn", **SMALL)
    data = quantize.prepare.stage(rounding)
    rounded = rounding.folder / "artifacts" / quantize.stage(rounding, rounding.base_model(), data).name
    rounding.make(quantize.stage(rounding, rounding.base_model(), data))
    with pytest.raises(ValueError, match="Q4_1 holds AWQ's numbers"):
        exported(monkeypatch, tmp_path, rounded, export__type="Q4_0")
    folder = exported(monkeypatch, tmp_path, rounded, export__type="Q4_1")
    stored = dict(iterate_tensors(rounded))
    stem = "language_model.model.layers.3.self_attn.q_proj."
    q, zero = (unpack(stored[stem + part]).T.contiguous() for part in ("qweight", "qzeros"))
    wanted = interleave(dequantize(q, zero, stored[stem + "scales"].T.contiguous()), 4)
    (tensor,) = [t for t in gguf.GGUFReader(folder / "model-Q4_1.gguf").tensors if t.name == "blk.3.attn_q.weight"]
    read = gguf.dequantize(tensor.data, tensor.tensor_type)
    assert np.abs(read - wanted.numpy()).max() <= 1e-3 * float(wanted.abs().max())
    assert torch.isfinite(wanted).all()


@needs_llama_cpp
@pytest.mark.slow
def test_derm_smol(monkeypatch, tmp_path):
    """A real language model of 30 layers and its tokenizer: 16 bits answer as transformers, 4 bits are a third."""
    make_derm_smol.build(tmp_path / "smol")
    sizes = {}
    for kind in ("F16", "Q4_0"):
        run = run_here(monkeypatch, tmp_path / "run", tmp_path / "smol", "configs/derm-smol.yaml", export__type=kind)
        made = export.stage(run, run.base_model())
        run.make(made)
        facts = json.loads((run.folder_of(made) / MANIFEST).read_text())
        sizes[kind] = facts["sizes"][f"model-{kind}.gguf"]
        assert facts["agreement"]["prompts"]
        if kind == "F16":
            assert facts["agreement"]["first_token_nats"] < 0.05 and facts["agreement"]["gap_nats"] < 0.05
    assert sizes["Q4_0"] < 0.36 * sizes["F16"]


def test_types_belong_to_their_format():
    assert load_config(None, [("export.type", "Q8_0")]).export.format in FORMATS
    with pytest.raises(ValueError, match="Input should be 'F16'"):
        load_config(None, [("export.type", "Q4_K_M")])
