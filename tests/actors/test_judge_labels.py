"""Where a label's probabilities are read from in what a judge has written, and when there are none."""

import pytest

from actors.judge.constrained import Grammars, _label_ids, _Row
from tests.judging import tiny_tokenizer


class _Tokens:
    """A tokenizer that has no token of its own for 3."""

    def tokenize_str(self, text: str) -> list[int]:
        return [7, 8] if text == "3" else [int(text)]

    def is_special_token(self, token: int) -> bool:
        return False

    def decode_bytes(self, ids: list[int]) -> bytes:
        return b"".join({10: b'{"label"', 11: b":4", 12: b"}", 4: b"4", 13: b":"}[token] for token in ids)


def test_without_a_token_for_each_label_there_are_no_probabilities():
    assert _label_ids(_Tokens()) is None
    assert _label_ids(Grammars(tiny_tokenizer(), 1024, [2]).tokens) is not None


@pytest.mark.parametrize(("ids", "at"), [((10, 11, 12), None), ((10, 13, 4, 12), 2)])
def test_a_label_that_is_part_of_a_longer_token_has_no_probabilities(ids, at):
    grammars = Grammars.__new__(Grammars)
    grammars.tokens, grammars.labels = _Tokens(), [0, 1, 2, 3, 4]
    row = _Row()
    for token in ids:
        row.note(token, -1.0, [0.1, 0.2, 0.3, 0.1, token / 100])
    written = row.finish(grammars, False)
    assert written.text == '{"label":4}' and written.label_at == at
    assert written.probabilities == (None if at is None else (0.1, 0.2, 0.3, 0.1, 0.04))
