"""The engine: what one model answers with layers switched off is what physically pruned models answer."""

import json
from pathlib import Path

import pytest
import torch

import actors.engine.answering
import actors.engine.replica
from actors.checkpoint.loading import language_model
from actors.checkpoint.pruning import prune_checkpoint
from actors.engine.answering import verify_drafts
from actors.engine.pace import Pace
from actors.engine.replica import LlavaReplica
from actors.specs import ModelSpec, Sample
from tests.tiny import (
    ARCHITECTURES,
    DERM_TINY,
    LAYERS,
    draw_samples,
    plain_answer,
    plain_model,
    processor_for,
    save_tiny,
)

REMOVED = ((), (0,), (2,), (LAYERS - 1,), (0, 3), (1, 2, 4))
TOKENS = 14
STOPS = list(range(2, 512, 16))  # every sixteenth token ends an answer, so that rows end at different steps


@pytest.fixture(scope="module", params=ARCHITECTURES)
def checkpoint(request, tmp_path_factory):
    """A tiny checkpoint of one architecture in which many tokens end an answer."""
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny(folder, request.param)
    set_stops(folder, STOPS)
    return str(folder)


def set_stops(folder: Path, stops: list[int]) -> None:
    file = Path(folder) / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": stops}))


def as_row(processor, sample: Sample, removed, ids: list[int]) -> dict:
    stopped = ids[-1] in STOPS
    return {
        "sample_id": sample.id,
        "removed": list(removed),
        "answer": processor.tokenizer.decode(ids, skip_special_tokens=True).strip(),
        "token_ids": ids,
        "tokens": len(ids) - stopped,
        "stopped": stopped,
    }


def test_answers_equal_physically_pruned_models(checkpoint, lesions, tmp_path):
    """Token for token, in one batch of six removed sets and prompts of three lengths, for every architecture."""
    samples = draw_samples(lesions)
    processor = processor_for(Path(checkpoint).name.split("-")[0])
    expected = {}
    for number, removed in enumerate(REMOVED):
        prune_checkpoint(checkpoint, str(tmp_path / str(number)), removed)
        model = plain_model(str(tmp_path / str(number)))
        assert len(language_model(model).layers) == LAYERS - len(removed)
        for sample in samples:
            ids = plain_answer(model, processor, sample, TOKENS)
            expected[sample.id, removed] = as_row(processor, sample, removed, ids)
    replica = LlavaReplica(ModelSpec(checkpoint))
    rows = replica.answers(samples, REMOVED, TOKENS)
    assert rows == [expected[sample.id, removed] for sample in samples for removed in REMOVED]
    assert len({row["answer"] for row in rows}) > len(rows) // 2, "the answers must differ for this to prove anything"
    assert len({row["tokens"] for row in rows}) > 3, "rows must end at different steps"


def test_trained_model_equals_plain_pruned_models(lesions, tmp_path):
    """derm-tiny, which ends its answers itself: the texts of three removed sets, and most stop before 48 tokens."""
    samples = draw_samples(lesions, 4)
    processor = processor_for("clip")
    rows = LlavaReplica(ModelSpec(str(DERM_TINY))).answers(samples, [(), (5,), (2, 8)], 48)
    expected = []
    for number, removed in enumerate([(), (5,), (2, 8)]):
        prune_checkpoint(str(DERM_TINY), str(tmp_path / str(number)), removed)
        model = plain_model(str(tmp_path / str(number)))
        ids = [plain_answer(model, processor, sample, 48) for sample in samples]
        expected.append([processor.tokenizer.decode(row, skip_special_tokens=True).strip() for row in ids])
    assert [row["answer"] for row in rows] == [answer for both in zip(*expected, strict=True) for answer in both]
    assert [row["answer"] for row in rows[::3]] != [row["answer"] for row in rows[2::3]]
    assert sum(row["stopped"] for row in rows) > 6


@pytest.fixture(scope="module")
def replica(tiny_path):
    return LlavaReplica(ModelSpec(tiny_path))


def test_batch_size_does_not_change_rows(tiny_path, replica, lesions):
    """One row at a time, five, and all at once give the same rows in the same order."""
    samples = draw_samples(lesions)
    together = replica.answers(samples, REMOVED, 8)
    assert [(row["sample_id"], tuple(row["removed"])) for row in together] == [
        (sample.id, removed) for sample in samples for removed in REMOVED
    ]
    for max_rows in (1, 5):
        assert LlavaReplica(ModelSpec(tiny_path), max_rows).answers(samples, REMOVED, 8) == together


def rows_of(prompts, base_L, keep_VL) -> int:
    """Return how many rows a pass has at most: the base's and those of the variants that differ."""
    return len(prompts) * (1 + int((keep_VL != base_L).any(1).sum()))


def full_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def full_cpu() -> None:
    torch.empty(10**14)


@pytest.fixture
def drafts_first(monkeypatch):
    """The base's answers are found first, whatever is known of drafts."""
    monkeypatch.setattr(Pace, "knows_drafts", lambda self: True)
    monkeypatch.setattr(Pace, "drafts_pay", lambda self, *_: True)


@pytest.mark.parametrize("full", [full_gpu, full_cpu])
def test_out_of_memory_halves_the_batch(tiny_path, replica, lesions, monkeypatch, full, drafts_first):
    """With room for 5 rows, six samples are halved, then one sample's variants are; no answer is lost."""
    samples = draw_samples(lesions)
    expected = replica.answers(samples, REMOVED, 4)
    tried = []

    def crowded(model, prompts, drafts, base_L, keep_VL, limits, pace):
        if (keep_VL != base_L).any():  # not the base's own answers
            tried.append(rows_of(prompts, base_L, keep_VL))
            if tried[-1] > 5:
                full()
        return verify_drafts(model, prompts, drafts, base_L, keep_VL, limits, pace)

    monkeypatch.setattr(actors.engine.replica, "verify_drafts", crowded)
    assert LlavaReplica(ModelSpec(tiny_path), max_rows=64).answers(samples, REMOVED, 4) == expected
    assert tried[0] == len(samples) * 6 and tried[1] == len(samples) // 2 * 6
    failures = [rows for rows in tried if rows > 5]
    assert len(failures) <= 4 and all(rows <= 5 for rows in tried[len(failures) :])


def test_out_of_memory_on_one_row_is_an_error(tiny_path, lesions, monkeypatch):
    """One row that does not fit cannot be halved: the error is the user's to see, not an endless loop."""

    monkeypatch.setattr(actors.engine.replica, "verify_drafts", lambda *_: full_gpu())
    with pytest.raises(torch.OutOfMemoryError):
        LlavaReplica(ModelSpec(tiny_path), max_rows=4).answers(draw_samples(lesions), [(), (1,)], 4)


def test_another_error_does_not_halve_the_batch(tiny_path, lesions, monkeypatch):
    tried = []

    def broken(*_):
        tried.append(1)
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(actors.engine.replica, "verify_drafts", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        LlavaReplica(ModelSpec(tiny_path)).answers(draw_samples(lesions), [(), (1,)], 4)
    assert len(tried) == 1


def test_logits_are_taken_in_bounded_parts(tiny_path, lesions, monkeypatch):
    """Of prompts with drafts of 8 tokens no more than 3 rows' logits at a time; the answers stay the same."""
    replica, samples = LlavaReplica(ModelSpec(tiny_path)), draw_samples(lesions)
    drafts = [[5] * 8 for _ in samples]
    expected = replica.answers(samples, REMOVED, 8, drafts=drafts)
    monkeypatch.setattr(Pace, "length", lambda self, variants, width, room, first, alone: room)
    vocabulary, seen = len(replica.model.lm_head.weight), []
    replica.model.lm_head.register_forward_hook(lambda m, a, logits: seen.append(logits.shape))
    monkeypatch.setattr(actors.engine.answering, "LOGITS_AT_ONCE", 3 * 8 * vocabulary + 1)
    assert replica.answers(samples, REMOVED, 8, drafts=drafts) == expected
    checked = [tuple(shape) for shape in seen if len(shape) == 3]
    assert set(checked) == {(3, 8, vocabulary)} and len(checked) == len(samples) * len(REMOVED) / 3


@pytest.mark.parametrize("sharers", [1, 4])
def test_rows_are_planned_from_free_memory(tiny_path, lesions, monkeypatch, drafts_first, sharers):
    """With 60 % of its share of the free memory holding three rows, no batch has more; the rows are the same."""
    replica = LlavaReplica(ModelSpec(tiny_path, sharers=sharers))
    samples = draw_samples(lesions)
    expected = replica.answers(samples, REMOVED, 4)
    tokens = max(len(replica._prompt(sample)) for sample in samples) + 4
    text = replica.model.config.text_config
    width = text.num_key_value_heads * text.hidden_size // text.num_attention_heads
    per_row = tokens * (4 * (2 * LAYERS * width + 8 * text.hidden_size) + tokens)  # float32, and a boolean mask
    monkeypatch.setattr(actors.engine.replica, "free_bytes", lambda device: sharers * 3.5 * per_row / 0.6)
    sizes = []

    def watched(model, prompts, drafts, base_L, keep_VL, limits, pace):
        sizes.append(rows_of(prompts, base_L, keep_VL))
        return verify_drafts(model, prompts, drafts, base_L, keep_VL, limits, pace)

    monkeypatch.setattr(actors.engine.replica, "verify_drafts", watched)
    assert replica.answers(samples, REMOVED, 4) == expected
    assert max(sizes) == 3


def test_an_image_is_parted_last(tiny_path, lesions, monkeypatch, drafts_first):
    """Room for 7 rows: three questions about an image with one variant at a time, not one question with all of them."""
    samples, replica = draw_samples(lesions), LlavaReplica(ModelSpec(tiny_path), max_rows=7)
    sizes = []

    def watched(model, prompts, drafts, base_L, keep_VL, limits, pace):
        sizes.append((len(prompts), len(keep_VL)))
        return verify_drafts(model, prompts, drafts, base_L, keep_VL, limits, pace)

    monkeypatch.setattr(actors.engine.replica, "verify_drafts", watched)
    rows = replica.answers(samples[::-1], REMOVED, 8)
    assert sizes == [(6, 1), *[(3, 1)] * 10]
    expected = LlavaReplica(ModelSpec(tiny_path)).answers(samples[::-1], REMOVED, 8)
    assert rows == expected


@pytest.mark.parametrize("layer", [-1, LAYERS])
def test_layer_out_of_range_is_named(replica, lesions, layer):
    """-1 must not silently mean the last layer."""
    with pytest.raises(ValueError, match=rf"Layer {layer} is out of range: the model has layers 0 to {LAYERS - 1}"):
        replica.answers(draw_samples(lesions), [(), (0, layer)], 4)


def test_tower_runs_once_per_image(tiny_path, lesions):
    """Six questions about two images, asked twice with six removed sets: the tower sees two images."""
    replica = LlavaReplica(ModelSpec(tiny_path))
    seen = []
    hook = replica.model.model.vision_tower.register_forward_hook(lambda *_: seen.append(1))
    samples = draw_samples(lesions)
    replica.answers(samples, REMOVED, 2)
    replica.answers(samples, REMOVED, 2)
    hook.remove()
    assert len(seen) == 2


def test_a_second_question_has_the_processors_tokens(tiny_path, lesions):
    """Without the image's pixels, which were seen before, the prompt is the same."""
    sample = draw_samples(lesions)[1]
    replica = LlavaReplica(ModelSpec(tiny_path))
    whole, places = replica.embedded(sample)
    replica.processor.image_processor = None  # not needed any more
    again, same_places = replica.embedded(sample)
    assert torch.equal(again, whole) and torch.equal(same_places, places)


def test_forgotten_images_are_encoded_again(tiny_path, lesions, monkeypatch):
    """With room for one image the answers stay the same."""
    samples = draw_samples(lesions)
    samples = samples[::2] + samples[1::2]  # images alternate
    expected = LlavaReplica(ModelSpec(tiny_path)).answers(samples, [()], 4)
    monkeypatch.setattr(actors.engine.replica, "IMAGES_KEPT", 1)
    assert LlavaReplica(ModelSpec(tiny_path)).answers(samples, [()], 4) == expected


def test_model_is_whole_again_after_answers(tiny_path, replica, lesions):
    """The switches are taken off: plain generate on the replica's model equals a fresh model's."""
    sample = draw_samples(lesions)[0]
    replica.answers([sample], [(1, 2)], 3)
    mine = plain_answer(replica.model, replica.processor, sample, 6)
    assert mine == plain_answer(plain_model(tiny_path), replica.processor, sample, 6)


def test_switches_come_off_after_an_error(replica, lesions, monkeypatch):
    """A failing forward must not leave a switched model behind."""
    stock = language_model(replica.model).layers
    monkeypatch.setattr(type(stock[3]), "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        replica.answers(draw_samples(lesions), [()], 3)
    assert language_model(replica.model).layers is stock


def test_nothing_asked_nothing_answered(replica, lesions):
    """No samples or no removed sets give no rows."""
    assert replica.answers([], [()], 4) == []
    assert replica.answers(draw_samples(lesions), [], 4) == []


def test_foreign_processor_is_an_error(tiny_path, lesions):
    """A processor that writes 17 image tokens for a tower of 16 features: both numbers are in the message."""
    replica = LlavaReplica(ModelSpec(tiny_path))
    replica.processor.num_additional_image_tokens = 2
    with pytest.raises(ValueError, match="17 image tokens but the tower gives 16"):
        replica.answers(draw_samples(lesions), [()], 2)


def test_unreadable_image_is_named(replica, tmp_path):
    """A broken file's path is in the message."""
    (tmp_path / "broken.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"broken\.png"):
        replica.answers([Sample("a", str(tmp_path / "broken.png"), "Name?")], [()], 2)
