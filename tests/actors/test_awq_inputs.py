"""What AWQ's search is given: real prompts with image features in place, and every layer's own arguments."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from actors.checkpoint.loading import language_model, load_model, load_processor
from actors.conversations import collate
from actors.quantizers import calibration
from actors.quantizers.calibration import calibration_inputs, decoder_inputs, inputs_of_checkpoint
from actors.specs import Conversation, ModelSpec
from tests.tiny import LAYERS, draw_conversations, save_tiny

REPLIES = ("This is melanoma.", "A red patch on skin.", "Psoriasis.", "A small waxy brown growth with dark dots.")


@pytest.fixture(scope="module")
def loaded(tiny_path):
    return load_model(tiny_path), load_processor(tiny_path)


@pytest.fixture
def conversations(lesions):
    """Four conversations about four images, each with a reply of another length."""
    drawn = draw_conversations(lesions, 4)
    return [Conversation(c.id, c.image, c.question, reply) for c, reply in zip(drawn, REPLIES, strict=True)]


def test_calibration_is_the_longer_half_without_padding(loaded, conversations):
    """Replies 3 and 1 are the longest: their rows, each with its own image, cut to the shorter of the two."""
    model, processor = loaded
    rows = calibration_inputs(model, processor, conversations)
    alone = [collate(processor, [conversations[i]]) for i in (3, 1)]
    shortest = alone[1]["input_ids"].shape[1]
    assert shortest < alone[0]["input_ids"].shape[1]
    assert rows["input_ids"].tolist() == [batch["input_ids"][0, :shortest].tolist() for batch in alone]
    assert torch.equal(rows["pixel_values"], torch.cat([batch["pixel_values"] for batch in alone]))
    assert not torch.equal(rows["pixel_values"][0], rows["pixel_values"][1])


@torch.inference_mode()
def test_first_hidden_states(loaded, conversations):
    """Embeddings of the text, the projector's features at the 16 image places, row by row."""
    model, processor = loaded
    rows = calibration_inputs(model, processor, conversations)
    hidden, kwargs = decoder_inputs(model, rows, LAYERS)
    for row in range(2):
        tower = model.model.vision_tower(rows["pixel_values"][row : row + 1], output_hidden_states=True)
        features = model.model.multi_modal_projector(tower.hidden_states[-2][:, 1:])[0]
        expected = language_model(model).embed_tokens(rows["input_ids"][row]).clone()
        places = (rows["input_ids"][row] == model.config.image_token_id).nonzero()[:, 0]
        assert len(places) == 16
        for place, feature in zip(places, features, strict=True):
            expected[place] = feature
        assert (hidden[row] - expected).abs().max() < 1e-5
    assert len(kwargs) == LAYERS
    assert all(set(each) == {"attention_mask", "position_ids", "position_embeddings"} for each in kwargs)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["clip-llama", "clip-mistral-window", "clip-qwen2-mixed"])
def test_recorded_arguments_repeat_the_model(name, tmp_path, conversations, monkeypatch):
    """Layer after layer on what was recorded, in parts of one row, gives what each layer gives inside the model."""
    monkeypatch.setattr(calibration, "TOKENS", 1)
    path = save_tiny(tmp_path, name)
    model = load_model(path)
    rows = calibration_inputs(model, load_processor(path), conversations)
    assert rows["input_ids"].shape[1] > 8  # longer than the windows
    hidden, kwargs = decoder_inputs(model, rows, LAYERS)
    inside = model(**rows, use_cache=False, output_hidden_states=True).hidden_states
    assert torch.equal(hidden, inside[0])
    for number, layer in enumerate(language_model(model).layers[:-1]):
        hidden = layer(hidden, **kwargs[number])
        assert (hidden - inside[number + 1]).abs().max() < 1e-4
    masks = {id(each["attention_mask"]) for each in kwargs}
    assert len(masks) == (2 if name == "clip-qwen2-mixed" else 1)


@pytest.mark.parametrize("name", ["clip-llama-tied", "siglip-llama", "clip-qwen2-mixed"])
def test_inputs_without_the_layers(name, tmp_path, conversations):
    """What is recorded with all but one layer of each kind left on the disk is what the whole model records."""
    path = save_tiny(tmp_path, name)
    model, config = load_model(path), AutoConfig.from_pretrained(path)
    expected, arguments = decoder_inputs(model, calibration_inputs(model, load_processor(path), conversations), LAYERS)
    hidden, kwargs = inputs_of_checkpoint(ModelSpec(path), Path(path), config, conversations)
    assert torch.equal(hidden, expected) and len(kwargs) == LAYERS == config.text_config.num_hidden_layers
    for one, other in zip(kwargs, arguments, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(_tensors(one), _tensors(other), strict=True))


def _tensors(kwargs: dict) -> list[torch.Tensor]:
    mask = [] if kwargs["attention_mask"] is None else [kwargs["attention_mask"]]
    return [*mask, kwargs["position_ids"], *kwargs["position_embeddings"]]


def test_calibration_without_images_has_no_image_tokens(tiny_path, lesions):
    """The text alone: the same questions and answers, shorter by the image's tokens."""
    model, processor = load_model(tiny_path), load_processor(tiny_path)
    conversations = draw_conversations(lesions, 4)
    seen = calibration_inputs(model, processor, conversations)
    blind = calibration_inputs(model, processor, [replace(item, image=None) for item in conversations])
    image = model.config.image_token_id
    assert (seen["input_ids"] == image).any() and not (blind["input_ids"] == image).any()
    assert set(blind) == {"input_ids"} and blind["input_ids"].shape[1] < seen["input_ids"].shape[1]
    hidden, _ = decoder_inputs(model, blind, 2)
    assert hidden.shape[:2] == blind["input_ids"].shape and torch.isfinite(hidden).all()
