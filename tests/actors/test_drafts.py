"""Drafts and shared prefixes change the cost of an answer, never the answer."""

import random
from contextlib import contextmanager
from itertools import cycle

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import pad
from transformers import LlamaConfig, MistralConfig, PhiConfig, Qwen2Config

from actors.checkpoint.loading import language_model
from actors.derm_tiny.build import SIDE
from actors.engine.answering import verify_drafts
from actors.engine.pace import Pace
from actors.engine.replica import LlavaReplica
from actors.engine.steps import Limits, StepPass
from actors.specs import ModelSpec
from tests.tiny import (
    ARCHITECTURES,
    DERM_TINY,
    LAYERS,
    QUESTIONS,
    config_of,
    draw_samples,
    random_model,
    save_tiny,
    without,
)

STOPS = tuple(range(2, 512, 16))
LIMITS = Limits(12, STOPS)
VARIANTS = [(), (0,), (1,), (3,), (LAYERS - 1,), (1, 3), (0, 2, 4), tuple(range(LAYERS - 1))]


QUICK = ("clip-llama", "clip-qwen2-mixed", "siglip-phi")
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES if name not in QUICK]


@pytest.fixture(scope="module", params=[*QUICK, *SLOW])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny(folder, request.param)
    return LlavaReplica(ModelSpec(str(folder)))


def keep(removed_sets, layers: int = LAYERS) -> torch.Tensor:
    rows = torch.ones(len(removed_sets), layers, dtype=torch.bool)
    for row, removed in enumerate(removed_sets):
        rows[row, list(removed)] = False
    return rows


@torch.inference_mode()
def generated(model, prompts, removed, limits: Limits = LIMITS) -> list[list[int]]:
    """Return what plain `generate` says, in a padded batch and without our engine, on the model without the layers."""
    longest = max(map(len, prompts))
    embeds = torch.stack([pad(prompt, (0, 0, longest - len(prompt), 0)) for prompt in prompts])
    mask = torch.stack([torch.arange(longest) >= longest - len(prompt) for prompt in prompts]).long()
    given = {"inputs_embeds": embeds, "attention_mask": mask, "pad_token_id": 0}
    limited = {"eos_token_id": list(limits.stops), "max_new_tokens": limits.tokens}
    with without(model, removed):
        return [limits.cut(row) for row in model.generate(**given, **limited, do_sample=False).tolist()]


def each(model, prompts, removed_sets) -> list[list[list[int]]]:
    """Return the same of several sets, as `verified` does: the answers of every prompt."""
    return [list(own) for own in zip(*(generated(model, prompts, removed) for removed in removed_sets), strict=True)]


def drawn_sets(picks: random.Random, layers: int, count: int) -> list[list[int]]:
    """Return sets of 0 to L - 3 layers."""
    return [picks.sample(range(layers), picks.randint(0, layers - 3)) for _ in range(count)]


def drawn_drafts(picks: random.Random, answers) -> list[list[int]]:
    """Return drafts of one kind or of many: right, wrong from the first token on, empty, too short, too long, ..."""
    kinds = {
        "right": lambda answer: answer,
        "wrong": lambda answer: [(token + 1) % 512 for token in answer],
        "noise": lambda answer: [picks.randrange(512) for _ in range(picks.randrange(30))],
        "empty": lambda answer: [],
        "short": lambda answer: answer[: len(answer) // 2],
        "astray": lambda answer: answer[: len(answer) // 2] + [7] * 6,
        "long": lambda answer: answer + [5] * 20,
    }
    chosen = picks.choices(list(kinds.values()), k=picks.choice([1, len(answers)]))
    return [draft(answer) for draft, answer in zip(cycle(chosen), answers)]


class AnyPace(Pace):
    """Pieces of any length, and an end of them at any time."""

    def __init__(self, picks: random.Random):
        super().__init__()
        self.picks = picks

    def length(self, variants, width, room, first, alone):
        return min(room, self.picks.choice([1, 1, 2, 3, 5, 99, 1 if first else 0]))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(seed=st.integers(0, 99))
def test_any_draft_any_base_any_sets(model, lesions, seed):
    """A random base, one to five random removed sets, random drafts, unequal prompts."""
    prompts = [model._prompt(sample) for sample in draw_samples(lesions)]
    picks = random.Random(seed)
    base, *removed = drawn_sets(picks, LAYERS, picks.randint(2, 6))
    drafts = drawn_drafts(picks, generated(model.model, prompts, base))
    pace = AnyPace(picks)
    answers, counts = verify_drafts(model.model, prompts, drafts, keep([base])[0], keep(removed), LIMITS, pace)
    assert answers == each(model.model, prompts, removed)
    assert counts["rows"] == len(prompts) * len(removed)


@st.composite
def architectures(draw):
    """Draw the config of a LLaVA of 3 to 6 layers: tower, family, heads, ties and windows."""
    family, layers = (
        draw(st.sampled_from([LlamaConfig, MistralConfig, Qwen2Config, PhiConfig])),
        draw(st.integers(3, 6)),
    )
    heads = draw(st.sampled_from([1, 2, 4, 8]))
    extra = {"num_attention_heads": heads, "tie_word_embeddings": draw(st.booleans())}
    extra["num_key_value_heads"] = draw(st.sampled_from([count for count in (1, 2, 4, 8) if heads % count == 0]))
    if family is MistralConfig or (family is Qwen2Config and draw(st.booleans())):
        extra["sliding_window"] = draw(st.integers(2, 24))
    if family is Qwen2Config and "sliding_window" in extra:
        extra |= {"use_sliding_window": True, "max_window_layers": draw(st.integers(0, layers - 1))}
    return config_of(draw(st.sampled_from(["clip", "siglip"])), family, layers, extra)


@torch.inference_mode()
def drawn_prompts(model, picks: random.Random) -> list[torch.Tensor]:
    """Return embedded prompts about one image, and one or two about another: questions of unequal length."""
    images = model.get_image_features(pixel_values=torch.randn(2, 3, SIDE, SIDE)).pooler_output
    embed, start = language_model(model).embed_tokens, picks.choices(range(512), k=3)
    questions = [picks.choices(range(512), k=length) for length in picks.sample(range(1, 14), 4)]
    about = [0, 0, picks.randrange(2), 1]
    return [
        torch.cat([embed(torch.tensor(start)), images[image], embed(torch.tensor(question))])
        for image, question in zip(about, questions, strict=True)
    ]


@settings(max_examples=10, deadline=None, derandomize=True)
@given(config=architectures(), seed=st.integers(0, 99))
def test_any_architecture(config, seed):
    """Answers of random models without 0 to L - 3 layers are those of plain `generate` on the pruned model.

    The drafts are of any kind, made from the answers of a random base, which the engine finds without drafts, too.
    """
    model, picks, layers = random_model(config, seed), random.Random(seed), config.text_config.num_hidden_layers
    prompts = drawn_prompts(model, picks)
    base, *removed = drawn_sets(picks, layers, 4)
    base_L, *keep_VL = keep([base, *removed], layers)
    own, _ = verify_drafts(model, prompts, [[] for _ in prompts], base_L, base_L[None], LIMITS)
    assert own == each(model, prompts, [base])
    drafts = drawn_drafts(picks, [answer for [answer] in own])
    answers, _ = verify_drafts(model, prompts, drafts, base_L, torch.stack(keep_VL), LIMITS, AnyPace(picks))
    assert answers == each(model, prompts, removed)


def test_a_draft_of_the_same_model_is_verified_whole(model, lesions):
    """The base as its own variant accepts every token and decodes nothing."""
    prompts = [model._prompt(sample) for sample in draw_samples(lesions)]
    full = torch.ones(LAYERS, dtype=torch.bool)
    right = generated(model.model, prompts, ())
    answers, counts = verify_drafts(model.model, prompts, right, full, full[None], LIMITS)
    assert [variants[0] for variants in answers] == right
    assert counts["rows_verified_whole"] == counts["rows"] == len(prompts)


@contextmanager
def layer_rows(model):
    """Count, on the stock layers themselves, the rows that every call runs."""
    rows: list[int] = []

    def note(layer, args, kwargs):
        rows.append(len(args[0] if args else kwargs["hidden_states"]))

    hooks = [each.register_forward_pre_hook(note, with_kwargs=True) for each in language_model(model).layers]
    try:
        yield rows
    finally:
        for hook in hooks:
            hook.remove()


def apart(replica, lesions) -> list[torch.Tensor]:
    """Return prompts about images that differ, so that none shares a row."""
    return [replica._prompt(sample) for sample in draw_samples(lesions, 3, QUESTIONS[:1])]


def test_prefix_sharing_runs_as_many_layers_as_the_formula_says(model, lesions):
    """All L single removals: the base runs L layers; the variant without layer b runs the L-1-b layers above it.

    Per prompt L + (0 + 1 + ... + L-1) = L (L + 1) / 2 layer rows, where plain decoding of the prompts runs
    L + L (L - 1). Answers of one token end with the pass that verifies.
    """
    prompts = apart(model, lesions)
    full = torch.ones(LAYERS, dtype=torch.bool)
    singles = keep([(layer,) for layer in range(LAYERS)])
    with layer_rows(model.model) as run:
        _, counts = verify_drafts(model.model, prompts, [[] for _ in prompts], full, singles, Limits(1, ()))
    assert sum(run) == counts["layer_rows_run"] == len(prompts) * LAYERS * (LAYERS + 1) // 2


def test_questions_about_an_image_share_a_row(model, lesions):
    """All questions about two images: two rows in every layer; the beginning is read once, and the image is in it."""
    prompts = [model._prompt(sample) for sample in draw_samples(lesions)]
    base_L = keep([(1,)])[0]
    with layer_rows(model.model) as run:
        answers, counts = verify_drafts(
            model.model, prompts, [[] for _ in prompts], base_L, base_L[None], Limits(1, ())
        )
    assert run == [2] * (LAYERS - 1)
    saved = (sum(map(len, prompts)) * (LAYERS - 1) - counts["layer_tokens_run"]) / (LAYERS - 1)
    assert saved >= 2 * (len(QUESTIONS) - 1) * model.model.config.image_seq_length
    assert [tokens for [tokens] in answers] == [answer[:1] for answer in generated(model.model, prompts, (1,))]


def test_a_later_round_shares_with_its_own_base(model, lesions):
    """Base without layer 1: the variant without 1 and 3 shares layers 0 and 2 (1 is off in both)."""
    prompts = apart(model, lesions)
    base_L, keep_VL = keep([(1,)])[0], keep([(1, 3)])
    with layer_rows(model.model) as run:
        _, counts = verify_drafts(model.model, prompts, [[] for _ in prompts], base_L, keep_VL, Limits(1, ()))
    assert sum(run) == counts["layer_rows_run"] == len(prompts) * ((LAYERS - 1) + (LAYERS - 4))
    answers, _ = verify_drafts(model.model, prompts, [[] for _ in prompts], base_L, keep_VL, LIMITS)
    assert answers == each(model.model, prompts, [(1, 3)])


def test_rows_that_ended_leave_the_batch(model, lesions, monkeypatch):
    """Before every step more than three quarters of the batch are open; who stays after others left says the same.

    Without drafts an answer has as many tokens as steps were made and one, so its length tells when its row ended.
    """
    sizes, forward = [], StepPass.forward

    def noted(self, decoder, tokens_R, positions_R):
        sizes.append(len(tokens_R))
        return forward(self, decoder, tokens_R, positions_R)

    monkeypatch.setattr(StepPass, "forward", noted)
    prompts = [model._prompt(sample) for sample in draw_samples(lesions)]
    full, limits = torch.ones(LAYERS, dtype=torch.bool), Limits(12, tuple(range(2, 512, 4)))
    answers, _ = verify_drafts(model.model, prompts, [[] for _ in prompts], full, keep(VARIANTS), limits)
    pairs = {(n, v): len(tokens) for n, found in enumerate(answers) for v, tokens in enumerate(found)}
    still = [sum(length > step for length in pairs.values()) for step in range(1, max(pairs.values()))]
    assert len(sizes) == len(still) and sizes[0] == still[0] > sizes[-1]
    assert all(count > 0.75 * size for count, size in zip(still, sizes, strict=True)), (still, sizes)
    by_length = sorted(pairs, key=pairs.__getitem__)
    for n, v in (by_length[len(pairs) // 2], by_length[-1]):
        assert [answers[n][v]] == generated(model.model, [prompts[n]], VARIANTS[v], limits)


def test_replica_drafts_and_base_do_not_change_rows(tmp_path, lesions):
    """The trained model: with its own drafts, with given ones, with another base, with one row a batch."""
    samples = draw_samples(lesions, 4)
    sets = [(), (5,), (2, 8), (0,)]
    replica = LlavaReplica(ModelSpec(str(DERM_TINY)))
    rows = replica.answers(samples, sets, 48)
    drafts = [row["token_ids"] for row in rows if not row["removed"]]
    assert replica.answers(samples, sets, 48, (), drafts) == rows
    guesses = [draft[:9] if number % 2 else [7, 2] for number, draft in enumerate(drafts)]
    assert replica.answers(samples, sets, 48, guesses=guesses) == rows
    assert replica.answers(samples, sets, 48, (5,)) == rows
    assert LlavaReplica(ModelSpec(str(DERM_TINY)), max_rows=1).answers(samples, sets, 48, (), drafts) == rows


@pytest.mark.parametrize(
    ("answer", "ended"), [([], False), ([7], False), ([7, 2], True), ([7] * 12, True), ([7] * 11, False)]
)
def test_limits(answer, ended):
    assert LIMITS.ended(answer) is ended


def test_limits_cut_drafts():
    assert LIMITS.cut([7, 2, 9]) == [7, 2]
    assert LIMITS.cut([7] * 30) == [7] * 12
    assert LIMITS.cut([7] * 12 + [2]) == [7] * 12
