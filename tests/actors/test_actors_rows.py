"""The engine's parts by hand: attention windows, masks of padded rows, the key/value cache of some rows."""

import pytest
import torch

from actors.rows import RowCache, RowPass, attention_windows
from tests.tiny import tiny_config

CPU = torch.device("cpu")


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


def test_mask_by_hand():
    """A padded row of 2 tokens and a row of 3, with no window and with a window of 2 tokens."""
    state = RowPass(torch.ones(2, 2, dtype=torch.bool), [None, 2], RowCache(4), CPU, [CPU, CPU])
    valid = torch.tensor([[0, 1, 1], [1, 1, 1]]).bool()
    positions = torch.tensor([[0, 0, 1], [0, 1, 2]])
    state.begin(positions, valid)
    full, window = state.mask(0)[:, 0].int(), state.mask(1)[:, 0].int()
    assert full[0, 1:].tolist() == [[0, 1, 0], [0, 1, 1]]
    assert full[1].tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert window[0, 1:].tolist() == [[0, 1, 0], [0, 1, 1]]
    assert window[1].tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    assert full[0, 0, 0] == window[0, 0, 0] == 1  # padding sees itself, so that its softmax is a number


def test_mask_of_the_next_token():
    """The second forward sees the first one's tokens, never its padding; a window forgets the oldest."""
    state = RowPass(torch.ones(2, 2, dtype=torch.bool), [None, 2], RowCache(4), CPU, [CPU, CPU])
    state.begin(torch.tensor([[0, 0, 1], [0, 1, 2]]), torch.tensor([[0, 1, 1], [1, 1, 1]]).bool())
    state.end(3)
    state.begin(torch.tensor([[2], [3]]), torch.ones(2, 1).bool())
    assert state.mask(0)[:, 0].int().tolist() == [[[0, 1, 1, 1]], [[1, 1, 1, 1]]]
    assert state.mask(1)[:, 0].int().tolist() == [[[0, 0, 1, 1]], [[0, 0, 1, 1]]]


def test_rows_plan_and_drop():
    """Three rows, of which row 1 skips layer 0 and row 0 skips layer 1; then row 0 ends."""
    state = RowPass(torch.tensor([[1, 0], [0, 1], [1, 1]]).bool(), [None, None], RowCache(2), CPU, [CPU, CPU])
    assert [rows.tolist() for rows in state.rows] == [[0, 2], [1, 2]]
    values = torch.arange(2.0).reshape(2, 1, 1, 1)
    state.begin(torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1).bool())
    state.cache.update(10 + values, 20 + values, 0)  # of rows 0 and 2
    state.cache.update(30 + values, 40 + values, 1)  # of rows 1 and 2
    state.end(1)
    state.drop(torch.tensor([False, True, True]))
    assert [rows.tolist() for rows in state.rows] == [[1], [0, 1]] and state.everyone == [False, True]
    new = torch.zeros(1, 1, 1, 1)
    assert [part.flatten().tolist() for part in state.cache.update(new, new, 0)] == [[11, 0], [21, 0]]
    new = torch.zeros(2, 1, 1, 1)
    assert [part.flatten().tolist() for part in state.cache.update(new, new, 1)] == [[30, 0, 31, 0], [40, 0, 41, 0]]


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
