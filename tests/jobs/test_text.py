"""Numbers and columns as people read them."""

from jobs.core.text import align, size


def test_columns_by_hand():
    """The first column flush left, the others flush right, and no spaces at the end of a line."""
    assert align([["name", "a", ""], ["b", "12345", "x"], ["longer", "1", ""]], left=1) == [
        "name        a",
        "b       12345  x",
        "longer      1",
    ]
    assert align([["a", "bb"], ["ccc", "d"]]) == ["  a  bb", "ccc   d"]


def test_sizes_by_hand():
    assert (size(3 * 2**29), size(3 * 2**19)) == ("1.50 GiB", "1.50 MiB")
