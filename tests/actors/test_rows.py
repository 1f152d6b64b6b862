"""The engine's parts by hand: attention windows, masks of padded rows, the key/value cache of some rows."""

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from actors.checkpoint.loading import language_model
from actors.engine.rows import Part, PromptPass
from actors.engine.steps import StepPass
from actors.engine.switch import RowCache, attention_windows, switched
from actors.engine.verification import plan_rows
from tests.tiny import LAYERS, WIDTH, tiny_config, tiny_model


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("clip-llama", [None] * 5),
        ("clip-phi", [None] * 5),
        ("clip-qwen2", [None] * 5),
        ("clip-mistral-window", [8] * 5),
        ("clip-qwen2-mixed", [None, None, 8, 8, 8]),
    ],
)
def test_attention_windows(name, expected):
    """A window counts only in layers that slide."""
    assert attention_windows(tiny_config(name).text_config) == expected


@pytest.fixture(scope="module")
def model():
    """Two layers that see everything, three with a window of 2 tokens."""
    made = tiny_model("clip-qwen2-mixed")
    made.config.text_config.sliding_window = 2
    return made


def keep(*rows: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([[layer not in removed for layer in range(LAYERS)] for removed in rows])


def masks_seen(layers, run) -> list:
    """Return the attention mask that every layer got while `run` ran."""
    seen: list = []
    hooks = [
        x.register_forward_pre_hook(lambda _, a, k: seen.append(k["attention_mask"]), with_kwargs=True) for x in layers
    ]
    run()
    for hook in hooks:
        hook.remove()
    return seen


def test_masks_by_hand(model):
    """Prompts of 2 and 3 tokens: no mask, and a band of 2; the next token sees its own prompt and not the padding."""
    layers = list(language_model(model).layers)
    prompts = [torch.randn(2, WIDTH), torch.randn(3, WIDTH)]
    prompt = PromptPass(model, keep((), ()))
    full, *_, window = masks_seen(layers, lambda: prompt.forward(model, pad_sequence(prompts, batch_first=True)))
    assert full is None
    assert window[0, 0].int().tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    state = StepPass([Part(prompt, [0, 1], [range(2), range(3)])], room=2, dtype=torch.float32)
    with switched(model, state) as decoder:
        tokens, positions = torch.tensor([5, 6]), torch.tensor([2, 3])
        full, *_, window = masks_seen(layers, lambda: state.forward(decoder, tokens, positions))
        assert full[:, 0, 0].exp().tolist() == [[1, 1, 0, 1], [1, 1, 1, 1]]
        assert window[:, 0, 0].exp().tolist() == [[0, 1, 0, 1], [0, 0, 1, 1]]
        full, *_, window = masks_seen(layers, lambda: state.forward(decoder, tokens, positions + 1))
        assert full[:, 0, 0].exp().tolist() == [[1, 1, 0, 1, 1], [1, 1, 1, 1, 1]]
        assert window[:, 0, 0].exp().tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 1, 1]]


def test_a_step_takes_the_rows_caches(model):
    """Of three rows, one skips layer 0 and one layer 1; two go on, then one: each layer holds their keys, or zeros."""
    prompt = PromptPass(model, keep((0,), (1,), ()))
    prompt.forward(model, torch.randn(3, 4, WIDTH))
    before = {layer: keys.clone() for layer, (keys, _) in prompt.cache.layers.items()}
    assert [len(before[layer]) for layer in range(LAYERS)] == [2, 2, 3, 3, 3]
    state = StepPass([Part(prompt, [0, 2], [range(3), range(4)])], room=1, dtype=torch.float32)
    keys = {layer: both[0] for layer, both in state.cache.layers.items()}
    assert not keys[0][0].any() and torch.equal(keys[0][1, :, :4], before[0][1])  # of rows 1 and 2
    assert torch.equal(keys[1][0, :, :3], before[1][0, :, :3])  # of rows 0 and 2
    assert torch.equal(keys[1][1, :, :4], before[1][1])
    assert torch.equal(keys[4][1, :, :4], before[4][2])
    assert prompt.cache.layers == {}
    state.drop(torch.tensor([False, True]))
    assert torch.equal(state.cache.layers[4][0][:, :, :4], before[4][[2]])
    assert state.valid_RS.tolist() == [[True] * 4 + [False]]


def test_a_layer_that_no_row_keeps_is_not_run(model):
    """A step skips it, and a row without another layer keeps its hidden state there, whatever the layer gives."""
    prompt = PromptPass(model, keep((1, 2), (1,)))
    prompt.forward(model, torch.randn(2, 3, WIDTH))
    state = StepPass([Part(prompt, [0, 1], [range(3), range(3)])], room=1, dtype=torch.float32)
    run = []
    nothing = torch.full((2, 1, WIDTH), torch.nan)
    stock = [layer.forward for layer in language_model(model).layers]
    for number, layer in enumerate(language_model(model).layers):
        layer.forward = lambda hidden, *_, number=number, **__: (
            run.append(number) or (nothing if number == 2 else hidden)
        )
    try:
        with switched(model, state) as decoder:
            hidden = state.forward(decoder, torch.tensor([5, 5]), torch.tensor([3, 3]))
    finally:
        for layer, forward in zip(language_model(model).layers, stock, strict=True):
            layer.forward = forward
    assert run == [0, 2, 3, 4]
    assert hidden[0].isfinite().all() and hidden[1].isnan().all()


def test_cache_grows_slot_by_slot():
    """Two tokens, then one: the cache returns all three, and `used` advances once per forward."""
    cache = RowCache(capacity=3)
    two = torch.tensor([1.0, 2.0]).reshape(1, 1, 2, 1)
    keys, values = cache.update(two, -two, 0)
    assert keys.flatten().tolist() == [1, 2] and values.flatten().tolist() == [-1, -2]
    assert cache.get_seq_length() == 0
    cache.used += 2
    one = torch.tensor([3.0]).reshape(1, 1, 1, 1)
    keys, values = cache.update(one, -one, 0)
    assert keys.flatten().tolist() == [1, 2, 3] and values.flatten().tolist() == [-1, -2, -3]


def test_cache_keeps_value_width():
    """Keys and values may differ in their last axis."""
    keys, values = RowCache(capacity=4).update(torch.ones(2, 3, 1, 8), torch.ones(2, 3, 1, 5), 0)
    assert keys.shape == (2, 3, 1, 8) and values.shape == (2, 3, 1, 5)
    assert keys.sum() == 48 and values.sum() == 30


def test_the_example_of_a_row_plan():
    base, variants = torch.tensor([True] * 4), torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1], [1, 0, 1, 1]]).bool()
    plan = plan_rows(2, base, variants)
    assert plan.source_R == [0, 1, 0, 1, 0, 1] and plan.join_R == [0, 0, 1, 1, 2, 2]
    assert plan.row_of == {(0, 1): 0, (1, 1): 1, (0, 2): 2, (1, 2): 3, (0, 0): 4, (1, 0): 5}
    assert plan.keep_RL.tolist() == [[True] * 4] * 2 + [[True, False, True, True]] * 2 + [[True, True, False, True]] * 2


@torch.inference_mode()
def test_the_example_of_a_step_pass(model):
    """Rows that read five and three tokens, and two new tokens each: one slot for both, positions of their own."""
    prompt = PromptPass(model, keep((), ()))
    prompt.forward(model, torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0)))
    steps = StepPass([Part(prompt, [0, 1], [range(5), range(3)])], 2, torch.float32)
    with switched(model, steps) as decoder:
        for positions in ([5, 3], [6, 4]):
            steps.forward(decoder, torch.tensor([1, 2]), torch.tensor(positions))
    assert steps.valid_RS.int().tolist() == [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 1, 1]]
    assert steps.key_positions_RS[0].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert steps.key_positions_RS[1, [0, 1, 2, 5, 6]].tolist() == [0, 1, 2, 3, 4]
