"""The pace of drafts follows measured costs and what drafts came to."""

import pytest

from actors.engine.pace import FIXED, Pace

A, B = b"a", b"b"


def paced(fixed: float = 20.0, second: float = 1e-3, **wrong_rates: float) -> Pace:
    """Return a pace that measured passes of `fixed` tokens' time and tokens of 1 ms, and 1,000 tokens per variant."""
    pace = Pace()
    for tokens in (8, 64, 512, 16, 128):
        pace.note_pass(tokens, second * (fixed + tokens))
    for name, rate in wrong_rates.items():
        for number in range(1000):
            pace.note_draft(name.encode(), 1 - int(number < 1000 * rate), number < 1000 * rate)
    return pace


@pytest.mark.parametrize("fixed", [0.5, 20.0, 300.0])
def test_the_cost_of_a_pass_is_measured(fixed):
    assert paced(fixed).fixed_tokens() == pytest.approx(fixed, rel=0.01)
    assert paced(fixed, second=1e-6).fixed_tokens() == pytest.approx(fixed, rel=0.01)
    assert Pace().fixed_tokens() == FIXED


def test_a_variant_of_which_little_is_known_is_taken_for_the_average():
    pace = paced(a=0.5)
    assert pace.wrong_rate(B) == pytest.approx(0.5, abs=0.01)
    pace.note_draft(B, 1000, False)
    assert pace.wrong_rate(B) < 0.01 and pace.wrong_rate(A) == pytest.approx(0.5, abs=0.01)


def test_pieces_are_as_long_as_drafts_are_right():
    right, half = paced(a=0.001), paced(a=0.5)
    settings = {"width": 6.0, "room": 64, "first": False, "alone": True}
    assert right.length([A] * 8, **settings) == 64
    assert 1 <= half.length([A] * 8, **settings) <= 4


def test_rows_are_decoded_where_pieces_cost_more():
    """One row, whose pieces run nearly all layers, beside others that are decoded anyway."""
    assert paced(a=0.6).length([A], width=1.9, room=64, first=False, alone=False) == 0
    assert paced(a=0.001).length([A] * 30, width=16.0, room=64, first=False, alone=False) > 8


def test_the_first_piece_is_free_of_the_pass_but_not_of_its_tokens():
    pace = paced(a=0.6)
    assert pace.length([A] * 48, width=30.0, room=64, first=True, alone=False) <= 2


@pytest.mark.parametrize(("rate", "share", "pay"), [(0.002, 0.5, True), (0.5, 0.5, False), (0.002, 0.99, False)])
def test_drafts_pay_where_they_are_right_and_layers_are_shared(rate, share, pay):
    widths = {bytes([variant]): share for variant in range(8)}
    assert paced(a=rate).drafts_pay(None, widths, inputs=16, prompts=48.0, room=64) is pay


def test_right_guesses_save_the_steps_of_the_base():
    """A small model, whose passes cost more than their tokens: all at once takes as many steps as the base alone."""
    pace, widths = paced(fixed=300.0, a=0.0), {A: 0.5}
    assert not pace.drafts_pay(None, widths, inputs=4, prompts=320.0, room=20)
    pace.note_draft(B, 1000, False, shared=False)
    assert pace.drafts_pay(B, widths, inputs=4, prompts=320.0, room=20)


def test_the_base_itself_tells_nothing_of_its_variants():
    pace = Pace()
    pace.note_draft(A, 50, False, shared=False)
    assert not pace.knows_drafts() and pace.wrong_rate(A) < 0.02 < pace.wrong_rate(B)
