"""What autoawq's search is given: real prompts with image features in place, and the first layer's own inputs."""

import pytest
import torch
from torch import nn

from actors.conversations import collate
from actors.loading import language_model, load_model, load_processor
from actors.quantizers.awq import calibration_inputs, first_layer_inputs
from actors.specs import Conversation
from tests.tiny import draw_conversations

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
def test_first_layer_inputs(loaded, conversations):
    """Embeddings of the text, the projector's features at the 16 image places, row by row."""
    model, processor = loaded
    rows = calibration_inputs(model, processor, conversations)
    hidden, kwargs = first_layer_inputs(model, rows)
    for row in range(2):
        tower = model.model.vision_tower(rows["pixel_values"][row : row + 1], output_hidden_states=True)
        features = model.model.multi_modal_projector(tower.hidden_states[-2][:, 1:])[0]
        expected = language_model(model).embed_tokens(rows["input_ids"][row]).clone()
        places = (rows["input_ids"][row] == model.config.image_token_id).nonzero()[:, 0]
        assert len(places) == 16
        for place, feature in zip(places, features, strict=True):
            expected[place] = feature
        assert (hidden[row] - expected).abs().max() < 1e-5
    assert set(kwargs) == {"attention_mask", "position_ids", "position_embeddings"}


@torch.inference_mode()
def test_recorded_arguments_repeat_the_first_layer(loaded, conversations):
    """The layer called with what was recorded gives what it gives inside the model; no hook stays behind."""
    model, processor = loaded
    rows = calibration_inputs(model, processor, conversations)
    hidden, kwargs = first_layer_inputs(model, rows)
    inside = {}
    layer: nn.Module = language_model(model).layers[0]
    handle = layer.register_forward_hook(lambda _, __, output: inside.update(output=output))
    model(**rows, use_cache=False)
    handle.remove()
    assert (layer(hidden, **kwargs) - inside["output"]).abs().max() < 1e-5
