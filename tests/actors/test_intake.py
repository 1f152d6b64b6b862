"""The first look at a checkpoint: every file broken in every way that came to mind, and what may be missing."""

import json
import re
import shutil

import pytest

from actors.checkpoint.intake import Intake
from actors.checkpoint.loading import load_model, load_processor
from actors.checkpoint.pruning import prune_checkpoint
from actors.engine.replica import LlavaReplica
from actors.images import probe_image
from actors.specs import ModelSpec, Sample
from tests.breaking import INDEX, breaks, entry, shard
from tests.tiny import ARCHITECTURES, plain_model, processor_for, save_tiny


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(a sharded checkpoint, one of another kind, an image)."""
    root = tmp_path_factory.mktemp("models")
    for name, kind in (("source", "clip-llama"), ("other", "siglip-phi")):
        save_tiny(root / name, kind)
        shard(root / name)
    probe_image().save(root / "image.png")
    return root / "source", root / "other", root / "image.png"


def test_whatever_is_broken_is_said_in_one_sentence_or_does_not_matter(models, tmp_path):
    """Refused at the first look, by path, reason and remedy; else the model loads and answers. No other end."""
    source, other, image = models
    refused, harmless, wrong = [], [], []
    for name, apply in breaks(other):
        folder = tmp_path / "copy"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)
        apply(folder)
        spec = ModelSpec(str(folder), gpus=0)
        try:
            Intake().look(spec)
        except ValueError as error:
            message = str(error)
            good = str(folder) in message and "\n" not in message and len(message) < 700
            (refused if good else wrong).append((name, message))
            continue
        except Exception as error:
            wrong.append((name, repr(error)))
            continue
        try:
            LlavaReplica(spec, 8).answers([Sample("a", str(image), "Name?")], [()], 3)
            harmless.append(name)
        except Exception as error:
            wrong.append((name, f"late: {error!r}"))
    assert not wrong
    assert len(refused) >= 170 and 20 <= len(harmless) <= 50
    assert {"index without metadata", f"{INDEX} missing", "generation_config.json missing"} <= set(harmless)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_whole_checkpoint_passes(name, tmp_path):
    assert Intake().look(ModelSpec(save_tiny(tmp_path / "a", name))) == {"completed": []}


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (entry("config.json", ["LlavaLlamaForCausalLM"], "architectures"), r"original LLaVA repository.*convert it"),
        (entry("config.json", 99, "vision_feature_layer"), r"vision_feature_layer is 99, but the tower has 3 layers"),
        (entry("config.json", 3, "text_config", "num_hidden_layers"), r"layers\.3\..*config.json has fewer layers"),
        (entry("config.json", 5, "text_config", "vocab_size"), r"'language_model\.model\.embed_tokens\.weight' as"),
        (entry("processor_config.json", 7, "patch_size"), r"makes \d+ image tokens and 64 x 64 pixels, but the tower"),
        (entry(INDEX, "no.safetensors", "weight_map", "lm_head.weight"), r"no\.safetensors' is missing or damaged"),
    ],
)
def test_words(models, tmp_path, broken, words):
    folder = shutil.copytree(models[0], tmp_path / "copy")
    broken(folder)
    with pytest.raises(ValueError, match=words):
        Intake().look(ModelSpec(str(folder)))


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_an_older_llava_without_a_processor_config(tower, tmp_path):
    """Its processor knows neither patches nor strategy: config.json does. What we make of it needs no such help."""
    source = tmp_path / "a"
    save_tiny(source, f"{tower}-llama")
    whole = json.loads((source / "processor_config.json").read_text())
    (source / "processor_config.json").unlink()
    (source / "preprocessor_config.json").write_text(json.dumps(whole["image_processor"]))
    spec = ModelSpec(str(source), gpus=0)
    entries = ["patch_size", "vision_feature_select_strategy", "num_additional_image_tokens"]
    assert Intake().look(spec) == {"completed": entries}
    processor, expected = load_processor(str(source)), processor_for(tower)
    assert [getattr(processor, name) for name in entries] == [getattr(expected, name) for name in entries]
    prune_checkpoint(str(source), str(tmp_path / "b"), [1])
    assert Intake().look(ModelSpec(str(tmp_path / "b"))) == {"completed": []}
    written = json.loads((tmp_path / "b" / "processor_config.json").read_text())
    assert written["patch_size"] == 16 and written["processor_class"] == "LlavaProcessor"


def test_shards_without_metadata_or_index(models, tmp_path):
    """transformers stops there; here the same model is loaded, and the source is left as it is."""
    whole = load_model(str(models[0])).state_dict()
    for broken in (entry(INDEX, ..., "metadata"), lambda folder: (folder / INDEX).unlink()):
        folder = shutil.copytree(models[0], tmp_path / "copy", dirs_exist_ok=True)
        broken(folder)
        before = sorted(path.name for path in folder.iterdir())
        loaded = load_model(str(folder)).state_dict()
        assert loaded.keys() == whole.keys() and all((loaded[name] == whole[name]).all() for name in whole)
        assert sorted(path.name for path in folder.iterdir()) == before
        prune_checkpoint(str(folder), str(tmp_path / "pruned"), [1])
        assert plain_model(str(tmp_path / "pruned")).config.text_config.num_hidden_layers == 4
        shutil.rmtree(folder)
        shutil.rmtree(tmp_path / "pruned")


def test_a_hub_that_does_not_answer(monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("Name or service not known\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ValueError, match=r"'owner/name' cannot be read .*not known and more.*check the name") as raised:
        Intake().look(ModelSpec("owner/name"))
    assert not re.search(r"\n", str(raised.value))
