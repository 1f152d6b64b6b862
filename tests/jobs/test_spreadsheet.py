"""Tables as spreadsheets write them: separators, encodings, names of columns."""

import codecs

import pytest

from jobs.core.spreadsheet import canonical_columns, read_csv
from jobs.judging.answer_tables import read_answers

ROWS = [
    {"question": "Größe; Farbe?", "reference": "a, b", "answer": 'the "best"\none'},
    {"question": "Café – où?", "reference": "x\ty", "answer": ""},
]


def csv_text(separator: str, names=("question", "reference", "answer")) -> str:
    def quoted(value: str) -> str:
        return '"' + value.replace('"', '""') + '"'

    lines = [separator.join(names), *(separator.join(map(quoted, row.values())) for row in ROWS)]
    return "\r\n".join(lines) + "\r\n"


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize(
    ("encoding", "mark", "said"),
    [
        ("utf-8", b"", None),
        ("utf-8", codecs.BOM_UTF8, None),
        ("utf-16-le", codecs.BOM_UTF16_LE, "utf-16"),
        ("utf-16-be", codecs.BOM_UTF16_BE, "utf-16"),
        ("utf-16-le", b"", "utf-16-le"),
        ("utf-16-be", b"", "utf-16-be"),
        ("cp1252", b"", "Windows-1252"),
    ],
)
def test_what_spreadsheets_write(tmp_path, capsys, separator, encoding, mark, said):
    """Every value as it is, and one line where the file is not UTF-8."""
    path = tmp_path / "a.csv"
    path.write_bytes(mark + csv_text(separator).encode(encoding))
    assert read_csv(path) == ROWS
    err = capsys.readouterr().err
    assert (f"{path}: read as {said}, since it is not UTF-8" in err) if said else err == ""
    assert [row["question"] for row in read_answers(str(path)).rows] == [row["question"] for row in ROWS]


def test_a_line_that_names_the_separator(tmp_path):
    (tmp_path / "a.csv").write_text("sep=;\r\na;b,c\r\n1;2\r\n")
    assert read_csv(tmp_path / "a.csv") == [{"a": "1", "b,c": "2"}]


def test_separators_in_quoted_names_do_not_count(tmp_path):
    (tmp_path / "a.csv").write_text('"a, really, a";b\n1;2\n')
    assert read_csv(tmp_path / "a.csv") == [{"a, really, a": "1", "b": "2"}]


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"question,reference,answer\n\x81\x8d\xff,b,c\n")
    with pytest.raises(ValueError, match=r"a\.csv' cannot be read: 'charmap' codec"):
        read_answers(str(tmp_path / "a.csv"))


def test_names_of_columns(tmp_path):
    """By case, spaces, hyphens; what is not known stays as it is; two of one name are refused."""
    columns = ["Question ", "REFERENCE", "Sample-ID", "my notes"]
    known = ("question", "reference", "sample_id")
    expected = {"Question ": "question", "REFERENCE": "reference", "Sample-ID": "sample_id"}
    assert canonical_columns(columns, known, "a.csv") == expected
    with pytest.raises(ValueError, match=r"a\.csv has the column question twice: 'question' and 'Question '"):
        canonical_columns(["question", "Question "], known, "a.csv")
    (tmp_path / "a.csv").write_text(csv_text(";", ("Question ", " reference", "ANSWER")))
    table = read_answers(str(tmp_path / "a.csv"))
    assert table.rows == ROWS and table.skipped == []


@pytest.mark.parametrize("suffix", [".xlsx", ".XLS", ".ods"])
def test_workbooks_are_refused_with_the_remedy(tmp_path, suffix):
    (tmp_path / f"a{suffix}").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"is a workbook, which is not read: save the sheet as CSV"):
        read_answers(str(tmp_path / f"a{suffix}"))
