"""A model whose layers are on several devices gives the answers of the model on one."""

import pytest
import torch
from accelerate import dispatch_model

import actors.engine.replica
from actors.checkpoint.loading import language_model, layer_devices
from actors.engine.answering import verify_drafts
from actors.engine.replica import LlavaReplica
from actors.engine.steps import Limits
from actors.specs import ModelSpec
from tests.places import Places, spread
from tests.tiny import ARCHITECTURES, LAYERS, WIDTH, draw_samples, save_tiny

REMOVED = ((), (0,), (2,), (LAYERS - 1,), (0, 3), (1, 2, 4))
GPUS = [torch.device("cuda", 0), torch.device("cuda", 1)]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def replica(request, tmp_path_factory):
    return LlavaReplica(ModelSpec(save_tiny(tmp_path_factory.mktemp(request.param), request.param)))


def test_accelerate_hooks_change_nothing(tiny_path, lesions):
    """Each layer, the tower, the projector, the norm and lm_head as a block of its own under accelerate's hooks."""
    replica, samples = LlavaReplica(ModelSpec(tiny_path)), draw_samples(lesions)
    expected = replica.answers(samples, REMOVED, 8)
    parts = ["embed_tokens", "rotary_emb", "norm", *(f"layers.{layer}" for layer in range(LAYERS))]
    names = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    names += [f"model.language_model.{part}" for part in parts]
    dispatch_model(replica.model, dict.fromkeys(names, "cpu"), force_hooks=True, skip_keys="past_key_values")
    assert hasattr(language_model(replica.model).layers[3], "_hf_hook")
    assert replica.answers(samples, REMOVED, 8) == expected


def test_two_devices_answer_like_one(replica, lesions):
    """Layers on two pretended GPUs: no operation mixes them, and drafts right and wrong give the same answers."""
    prompts = [replica._prompt(sample) for sample in draw_samples(lesions)]
    keep_VL, limits = replica.keep(REMOVED), Limits(10, tuple(range(2, 512, 16)))
    whole = torch.ones(LAYERS, dtype=torch.bool)
    expected, _ = verify_drafts(replica.model, prompts, [[] for _ in prompts], whole, keep_VL, limits)
    right = [answers[0] for answers in expected]
    wrong = [[7, 8, 9] for _ in prompts]
    places = Places()
    model = spread(replica.model, places, GPUS)
    with places:
        assert layer_devices(model) == [GPUS[0]] * 3 + [GPUS[1]] * 2
        there = [prompt.to(GPUS[0]) for prompt in prompts]
        for drafts in (right, wrong, [[] for _ in prompts]):
            answers, _ = verify_drafts(model, there, drafts, whole, keep_VL, limits)
            assert answers == expected
    assert places.moves > 100


def test_a_replica_on_two_devices(tiny_path, lesions, monkeypatch):
    """From the image to the text; the fuller device, with room for two rows of its layers, sets the batch."""
    samples, two = draw_samples(lesions), LlavaReplica(ModelSpec(tiny_path))
    expected = two.answers(samples, REMOVED, 8)
    tokens = max(len(two.inputs(sample)["input_ids"][0]) for sample in samples) + 8
    places, asked = Places(), []
    two.model, two.device = spread(two.model, places, GPUS), GPUS[0]
    two._features.clear()
    layers_on = {GPUS[0]: 3, GPUS[1]: 2}

    def free(device):  # float32: keys and values of the device's layers, activations, mask
        asked.append(device)
        return (2.5 if device == GPUS[1] else 9) * tokens * (4 * WIDTH * (2 * layers_on[device] + 8) + tokens) / 0.6

    monkeypatch.setattr(actors.engine.replica, "free_bytes", free)
    with places:
        assert two.answers(samples, REMOVED, 8) == expected
    assert set(asked) == set(GPUS) and two._rows == 2


def test_the_pretended_devices_do_not_mix(replica):
    """The check can fail: an index, a mask or a summand on the other device is refused."""
    places = Places()
    with places:
        one, other = torch.ones(3, device=GPUS[0]), torch.ones(3, device=GPUS[1])
        assert (one + one).device == GPUS[0] and other.to(GPUS[0]).device == GPUS[0]
        for wrong in (
            lambda: one + other,
            lambda: one[other.bool()],
            lambda: one[torch.tensor([0])],
            lambda: one.index_copy(0, torch.tensor([0], device=GPUS[1]), one[:1]),
            lambda: torch.cat([one, other]),
            lambda: one.__setitem__(0, other[0]),
        ):
            with pytest.raises(RuntimeError, match="tensors on"):
                wrong()
