"""Half precision: the engine's batched answers differ from plain pruned models' only where rounding decides."""

import copy

import pytest
import torch

import tests.ties
from actors.checkpoint.loading import load_model
from actors.checkpoint.pruning import prune_checkpoint
from actors.derm_tiny.build import build_processor
from tests.ties import Mismatch, compare, mismatch
from tests.tiny import (
    ARCHITECTURES,
    DERM_TINY,
    LAYERS,
    draw_samples,
    plain_answer,
    plain_inputs,
    plain_model,
    save_tiny,
)

DTYPES = ("float16", "bfloat16")
REMOVED = ((), (0,), (2,), (0, 3), (1, 2, 4))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*ARCHITECTURES, "derm-tiny"])
def test_answers_differ_only_at_ties(name, dtype, lesions, tmp_path):
    """Every architecture in both types: most answers are identical, and every other one turns on a tie."""
    path = str(DERM_TINY) if name == "derm-tiny" else save_tiny(tmp_path / "model", name)
    count, found = compare(path, tmp_path, dtype, draw_samples(lesions, 1), REMOVED, 14)
    assert count == 15
    assert all(each.is_tie for each in found), [(each.place, each.ratio) for each in found]
    assert len(found) <= count // 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_like_is_compared_with_like(tiny_path, dtype):
    """Our loaded model and the plain one: the same rounded weights, buffers and attention."""
    mine, plain = load_model(tiny_path, dtype), plain_model(tiny_path, getattr(torch, dtype))
    pairs = zip(mine.state_dict().items(), plain.state_dict().items(), strict=True)
    assert all(a == b and torch.equal(x.cpu(), y) and x.dtype == y.dtype for (a, x), (b, y) in pairs)
    for one, other in zip(mine.buffers(), plain.buffers(), strict=True):
        assert torch.equal(one.cpu(), other) and one.dtype == other.dtype
    for part in ("text_config", "vision_config"):
        assert getattr(mine.config, part)._attn_implementation == "sdpa"
        assert getattr(plain.config, part)._attn_implementation == "sdpa"


@pytest.fixture(scope="module")
def trio(tiny_path, lesions):
    """A model in bfloat16, the same weights in float32, one question's inputs and its plain answer."""
    half = plain_model(tiny_path, torch.bfloat16)
    sample = draw_samples(lesions, 1)[0]
    answer = plain_answer(half, build_processor(), sample, 8)
    return half, copy.deepcopy(half).float(), plain_inputs(build_processor(), sample), answer


def test_a_wrong_token_is_no_tie(trio):
    """Every token but the few that rounding can lift to the top is refused, at the place where it stands."""
    half, exact, inputs, answer = trio
    refused = 0
    for token in range(0, 512, 7):
        if token == answer[3]:
            continue
        found = mismatch(half, exact, inputs, [*answer[:3], token], answer)
        assert found.place == 3
        refused += not found.is_tie
    assert refused > 60


def test_a_tie_is_a_tie(trio):
    """Two tokens with one row of lm_head have equal logits: which comes first is nobody's mistake."""
    half, exact, inputs, answer = trio
    twin = (answer[2] + 1) % 512
    half, exact = copy.deepcopy(half), copy.deepcopy(exact)
    for model in (half, exact):
        model.lm_head.weight.data[twin] = model.lm_head.weight.data[answer[2]]
    found = mismatch(half, exact, inputs, [*answer[:2], twin], answer)
    assert (found.place, found.gap) == (2, 0.0) and found.rounding > 0 and found.is_tie


def test_gap_and_rounding_by_hand():
    """A gap of twice the rounding error can be turned around, a larger one cannot; no rounding, no excuse."""
    assert Mismatch(0, 0.5, 0.25).is_tie and Mismatch(0, 0.5, 0.25).ratio == 2
    assert not Mismatch(0, 0.51, 0.25).is_tie
    assert not Mismatch(0, 0.1, 0.0).is_tie


def test_an_answer_that_stops_early_is_no_tie(trio):
    """A missing end has no two tokens to compare."""
    half, exact, inputs, answer = trio
    with pytest.raises(ValueError, match="beginning of the other: 5 and 8 tokens"):
        mismatch(half, exact, inputs, answer[:5], answer)


def test_another_removal_is_no_tie(lesions, tmp_path, monkeypatch):
    """The check fails on an engine that removes another layer than the plain model lacks."""
    monkeypatch.setattr(tests.ties, "prune_checkpoint", lambda path, out, _: prune_checkpoint(path, out, [LAYERS - 2]))
    path = save_tiny(tmp_path / "model", "clip-llama")
    _, found = compare(path, tmp_path, "bfloat16", draw_samples(lesions, 1), [(1,)], 8)
    assert found and not any(each.is_tie for each in found)
