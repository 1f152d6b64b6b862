"""Inputs that begin alike share a row: which do, where their tokens stand, and what each of them sees."""

import pytest
import torch

from actors.engine.packing import MOST_TOGETHER, Layout, packs


def tokens(text: str) -> torch.Tensor:
    """Return one embedding per letter, [letters, 2]."""
    return torch.tensor([[float(ord(letter)), 1.0] for letter in text])


def text(embeds: torch.Tensor) -> str:
    return "".join(chr(int(value)) if value else "." for value in embeds[:, 0].tolist())


def packed(*inputs: str) -> list:
    """Return the packs of inputs written "prompt|draft"."""
    prompts = [tokens(one.split("|")[0]) for one in inputs]
    return packs(prompts, [tokens(one.replace("|", "")) for one in inputs])


def test_rows_by_hand():
    """Two images with two questions each: one layout, in which shorter ones are padded; a third image by itself."""
    single, pair = packed("AAAAAqr|xy", "BBBBBs|z", "AAAAAt|x", "BBBBBuuu|", "CCCCCvvv|w")
    assert single.rows == [[4]] and text(single.embeds_GQD[0]) == "CCCCCvvvw"
    assert pair.rows == [[1, 3], [2, 0]] and pair.shared == 5
    assert [text(row) for row in pair.embeds_GQD] == ["BBBBBszuuu.", "AAAAAtxqrxy"]
    assert pair.layout.positions_Q.tolist() == [0, 1, 2, 3, 4, 5, 6, 5, 6, 7, 8]
    assert pair.slots(0, 6) == [0, 1, 2, 3, 4, 5]
    assert pair.slots(1, 8) == [0, 1, 2, 3, 4, 7, 8, 9]


def test_the_example_of_the_docstring():
    [pack] = packed("iiiab|", "iiic|")
    assert (text(pack.embeds_GQD[0]), pack.shared, pack.starts) == ("iiicab", 3, [3, 4])
    assert pack.layout.positions_Q.tolist() == [0, 1, 2, 3, 3, 4]
    assert pack.layout.branches_Q.tolist() == [-1, -1, -1, 0, 1, 1]


def test_a_part_sees_the_beginning_and_itself():
    """Beginning "AA", parts "p" and "qr"; with a window of 2, positions decide and not slots."""
    [pack] = packed("AAp|", "AAqr|")
    full = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 0, 1, 1]]
    band = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 1, 0, 1, 0], [0, 0, 0, 1, 1]]
    assert pack.layout.mask(None)[0, 0].int().tolist() == full
    assert pack.layout.mask(2)[0, 0].int().tolist() == band


def test_a_single_input_needs_a_mask_for_its_window_alone():
    assert Layout.plain(3).mask(None) is None and Layout.plain(3).mask(3) is None
    assert Layout.plain(3).mask(2)[0, 0].int().tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]


def test_equal_prompts_keep_their_last_token():
    """The place after which the answer begins is each input's own."""
    [pack] = packed("AAB|x", "AAB|y")
    assert pack.shared == 2 and text(pack.embeds_GQD[0]) == "AABxBy"


@pytest.mark.parametrize(
    ("inputs", "rows"),
    [
        (["AAAbcde|", "AAAfghi|"], [[[0], [1]]]),  # less than half in common
        (["AAAAbcd|", "AAAAfgh|"], [[[0, 1]]]),
        (["A" * 9 + "|", "B" * 30 + "|", "C" * 8 + "|", "D" * 10 + "|"], [[[2], [0]], [[3]], [[1]]]),  # like lengths
        (["AAAab|", "AAAcd|", "BBBab|"], [[[2]], [[0, 1]]]),  # as many inputs in every row
        (["AAAAAAbbbbbb|", "AAAAAAc|", "BBBBBBc|", "BBBBBBd|"], [[[2, 3]], [[1, 0]]]),
    ],
)
def test_who_stands_beside_whom(inputs, rows):
    assert [pack.rows for pack in packed(*inputs)] == rows


def test_rows_are_not_too_long():
    found = packed(*(f"AAAAAA{number}|" for number in range(MOST_TOGETHER + 2)))
    assert [len(pack.rows[0]) for pack in found] == [2, MOST_TOGETHER]
