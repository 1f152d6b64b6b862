"""The embedded world and its committed model."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from actors.checkpoint.loading import load_model, load_processor
from actors.derm_tiny import sentences
from actors.derm_tiny.build import build_model, build_processor, save
from actors.derm_tiny.draw import draw, sample_lesion, write_tree
from actors.derm_tiny.train import draw_bank, exact_share, plant_outliers, to_pixels
from actors.derm_tiny.world import CLASSES, POSITIONS, QUESTIONS, SIZES, TONES, Lesion, answer
from tests.tiny import DERM_TINY, plain_model, tiny_model

LESION = Lesion(label=4, tone=2, position=3, size=0, hairs=False)


def test_answers_by_hand():
    """Class 4 is melanoma: dark skin, lower left, small, no hairs."""
    assert answer(LESION, "name") == "This is melanoma."
    assert answer(LESION, "describe") == (
        "A small irregular black stain of several colours in the lower left on dark skin, without hairs."
    )
    assert answer(replace(LESION, hairs=True), "describe").endswith("with hairs.")
    assert answer(LESION, "about").startswith("Melanoma is a dangerous cancer")
    with pytest.raises(KeyError):
        answer(LESION, "treatment")


def test_drawing_is_a_function_of_the_seed():
    """The same seed gives the same pixels, whatever was drawn before; another seed gives others."""
    first = draw(LESION, np.random.default_rng(1))
    draw(replace(LESION, label=2), np.random.default_rng(9))
    assert np.array_equal(draw(LESION, np.random.default_rng(1)), first)
    assert not np.array_equal(draw(LESION, np.random.default_rng(2)), first)
    assert first.shape == (64, 64, 3) and first.dtype == np.uint8 and first.std() > 5


def test_attributes_can_be_seen():
    """A melanoma at the lower left darkens that quarter, and a dark skin is darker than a light one."""
    image = draw(replace(LESION, tone=0, size=2), np.random.default_rng(1)).astype(float)
    assert image[36:52, 12:28].mean() < image[4:20, 44:60].mean() - 80
    dark = draw(replace(LESION, size=2), np.random.default_rng(1)).astype(float)
    assert dark[4:20, 44:60].mean() < image[4:20, 44:60].mean() - 80


def test_lesions_are_drawn_evenly():
    """4,000 lesions: each class, tone, position and size within a fifth of its share; hairs do not follow the class."""
    rng = np.random.default_rng(0)
    lesions = [sample_lesion(rng) for _ in range(4000)]
    for field, choices in (("label", CLASSES), ("tone", TONES), ("position", POSITIONS), ("size", SIZES)):
        counts = np.bincount([getattr(lesion, field) for lesion in lesions])
        assert len(counts) == len(choices)
        assert np.abs(counts * len(choices) / 4000 - 1).max() < 0.2
    hairs = [np.mean([lesion.hairs for lesion in lesions if lesion.label == label]) for label in range(8)]
    assert min(hairs) > 0.4 and max(hairs) < 0.6


def test_bank_does_not_depend_on_workers():
    """Image i is a function of (seed, i): one process or two, 20 images or 12 of them."""
    images, lesions = draw_bank(20, seed=4, workers=1)
    others, other_lesions = draw_bank(12, seed=4, workers=2)
    assert np.array_equal(images[:12], others) and lesions[:12] == other_lesions


def test_tree(tmp_path):
    """9 lesions per class, two of them twice: 88 files, and every annotation says what its pixels show."""
    assert write_tree(tmp_path / "a", per_class=9, seed=6) == 88
    write_tree(tmp_path / "b", per_class=9, seed=6)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.png"))
    assert len(files) == 88
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    with open(tmp_path / "a" / "annotations.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert sorted(Path(row["path"]) for row in rows) == files
    by_folder = {kind.folder: kind.look for kind in CLASSES}
    assert all(by_folder[row["path"].split("/")[0]] in row["answer"] for row in rows)
    series = [row["answer"] for row in rows if row["path"].startswith("Melanoma/melanoma-008-")]
    assert len(series) == 2 and series[0] == series[1]
    with open(tmp_path / "a" / "sentences.csv", newline="") as stream:
        answers = {(row["path"], row["question_id"]): row["answer"] for row in csv.DictReader(stream)}
    assert set(answers) == {(file.as_posix(), question) for file in files for question in sentences.QUESTIONS}
    names = {kind.folder: kind.name for kind in CLASSES}
    assert all(names[path.split("/")[0]] in answer.lower() for (path, q), answer in answers.items() if q != "report")
    assert len({answer for (_, q), answer in answers.items() if q == "name"}) > len(CLASSES)  # of several wordings
    assert (tmp_path / "a/sentences.csv").read_bytes() == (tmp_path / "b/sentences.csv").read_bytes()


def test_pixels_are_the_processors(tmp_path):
    """Training normalises as the image processor does at inference."""
    processor = load_processor(str(DERM_TINY))
    image = draw(LESION, np.random.default_rng(3))
    Image.fromarray(image).save(tmp_path / "a.png")
    theirs = processor.image_processor(Image.open(tmp_path / "a.png"), return_tensors="pt")["pixel_values"]
    assert (to_pixels(image[None], processor) - theirs).abs().max() < 1e-5


def test_planted_outliers_leave_the_function():
    """Channels become 50 times larger, a tenth of them, and the float32 logits stay within 1e-4."""
    model = tiny_model("clip-llama")
    ids = torch.tensor([[1, 20, 40, 60, 80, 100]])
    layer = model.model.language_model.layers[2]
    norm, up = layer.input_layernorm.weight.detach().clone(), layer.mlp.up_proj.weight.detach().clone()
    with torch.inference_mode():
        before = model(input_ids=ids).logits
        plant_outliers(model, share=0.1, factor=50.0, seed=1)
        after = model(input_ids=ids).logits
    assert (after - before).norm() < 1e-4 * before.norm()
    ratio = (layer.input_layernorm.weight.detach() / norm).round()
    assert sorted(ratio.tolist()) == [1.0] * 58 + [50.0] * 6
    rows = (layer.mlp.up_proj.weight.detach().norm(dim=1) / up.norm(dim=1)) > 25
    assert int(rows.sum()) == 13  # a tenth of 128 rows


def test_untrained_model_saves_under_published_names(tmp_path):
    """float16, the names of llava-hf, and plain transformers finds every weight."""
    processor = build_processor()
    torch.manual_seed(0)
    save(build_model(processor, layers=2), processor, tmp_path)
    check_names(tmp_path, layers=2)
    plain_model(str(tmp_path))


def check_names(folder: Path, layers: int) -> None:
    with safe_open(folder / "model.safetensors", framework="pt") as stream:
        types = {name: stream.get_slice(name).get_dtype() for name in stream.keys()}  # noqa: SIM118
    assert set(types.values()) == {"F16"}
    prefixes = (
        "language_model.model.",
        "language_model.lm_head.",
        "vision_tower.vision_model.",
        "multi_modal_projector.",
    )
    assert all(name.startswith(prefixes) for name in types)
    assert {name.split(".")[3] for name in types if ".layers." in name and name.startswith("language")} == {
        str(i) for i in range(layers)
    }


def test_committed_checkpoint():
    """Published names, ten layers, under 8 MB, and plain transformers loads it with nothing missing."""
    check_names(DERM_TINY, layers=10)
    assert sum(file.stat().st_size for file in DERM_TINY.iterdir()) < 8 * 2**20
    model = plain_model(str(DERM_TINY))
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_132_928
    settings = json.loads((DERM_TINY / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_committed_checkpoint_answers():
    """On 60 fresh images: names nearly always right, and 85 % of all answers word for word."""
    shares = exact_share(load_model(str(DERM_TINY)), load_processor(str(DERM_TINY)), count=60, seed=2024)
    assert sorted(shares) == sorted(QUESTIONS)
    assert shares["name"] >= 0.9
    assert sum(shares.values()) / 3 >= 0.85


def test_committed_checkpoint_has_outliers():
    """In each layer at least a tenth of the input norm's channels are over 20 times the median."""
    model = load_model(str(DERM_TINY))
    for layer in model.model.language_model.layers:
        size = layer.input_layernorm.weight.detach().abs()
        assert float((size > 20 * size.median()).float().mean()) >= 0.1
