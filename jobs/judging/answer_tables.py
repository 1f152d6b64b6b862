"""Anyone's tables: CSV, Parquet or JSONL files, read as rows of text; broken rows are listed with the reason."""

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from cluster.connection import in_submitted_job
from cluster.tables import read_table
from jobs.core.spreadsheet import SPREADSHEETS, canonical_columns, read_csv

REQUIRED = ("question", "reference", "answer")
OPTIONAL = ("sample_id", "question_id", "image", "group", "class")
MAY_BE_EMPTY = ("answer",)


@dataclass(frozen=True)
class AnswerTable:
    """A file's usable rows (text, or None where an optional value is missing), and the reasons of the skipped ones."""

    path: Path
    rows: list[dict]
    skipped: list[dict]

    @property
    def name(self) -> str:
        """The file's name."""
        return self.path.name

    @property
    def parquet(self) -> Path:
        """Where the judged rows go: beside the file."""
        return self.path.with_name(f"{self.path.stem}.judged.parquet")

    @property
    def summary(self) -> Path:
        """Where the summary goes."""
        return self.path.with_name(f"{self.path.stem}.judged.json")


def read_answers(text: str) -> AnswerTable:
    """Read a table of answers: columns question, reference, answer, and those of OPTIONAL that it has.

    ValueError: no such file, an unknown format, a missing column, or no row that can be used.
    """
    return read_table_of(text, REQUIRED, OPTIONAL)


def read_table_of(text: str, required: Sequence[str], optional: Sequence[str]) -> AnswerTable:
    """Read the named columns of a file; a row without a required value is skipped, an empty answer is an answer."""
    path = Path(text).expanduser()
    if not path.is_absolute() and in_submitted_job():
        raise ValueError(
            f"{text!r} is relative, but a submitted job runs in a temporary folder that Ray deletes, results and all: "
            "give an absolute path that all nodes see."
        )
    if not path.is_file():
        raise ValueError(f"There is no table {text!r}: give a CSV, Parquet or JSONL file.")
    if path.suffix.lower() in SPREADSHEETS:
        raise ValueError(f"{text!r} is a workbook, which is not read: save the sheet as CSV (UTF-8), and give that.")
    try:
        records = list(_READERS[path.suffix.lower()](path))
    except KeyError:
        raise ValueError(f"{text!r} has no known suffix: {', '.join(_READERS)}.") from None
    except (UnicodeDecodeError, csv.Error, pa.ArrowException, OSError) as error:
        raise ValueError(f"{text!r} cannot be read: {' '.join(str(error).split())[:200]}") from None
    columns = list(dict.fromkeys(key for row in records if isinstance(row, dict) for key in row))
    names = canonical_columns(columns, (*required, *optional), text)
    records = [
        {names.get(key, key): value for key, value in row.items()} if isinstance(row, dict) else row for row in records
    ]
    columns = [names.get(column, column) for column in columns]
    lacking = [name for name in required if name not in columns]
    if lacking:
        raise ValueError(
            f"{text} lacks the columns {', '.join(lacking)}; it has {', '.join(map(str, columns)) or 'none'}."
        )
    chosen = [*required, *(name for name in optional if name in columns)]
    rows, skipped = [], []
    for number, row in enumerate(records, 1):
        reason = _reason(row, required)
        if isinstance(row, str) or reason:
            skipped.append({"row": number, "reason": reason})
        else:
            rows.append({name: _value(row.get(name), name) for name in chosen})
    if not rows:
        raise ValueError(f"{text} has no usable row" + (f": {skipped[0]['reason']} (row 1)." if skipped else "."))
    return AnswerTable(path, rows, skipped)


def _reason(row: dict | str, required: Sequence[str]) -> str:
    """Return what is wrong with a row; empty: nothing."""
    if isinstance(row, str):
        return row
    for name in required:
        value = row.get(name)
        if value is None:
            return f"{name} is null"
        if not isinstance(value, str) and name in REQUIRED:
            return f"{name} is not text but {type(value).__name__}"
        if not str(value).strip() and name not in MAY_BE_EMPTY:
            return f"{name} is empty"
    return ""


def _value(value, name: str) -> str | None:
    if value is None or value != value or (value == "" and name not in MAY_BE_EMPTY):  # NaN is how pandas says null
        return None
    return str(value).encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # JSON may hold half characters


def _jsonl(path: Path) -> Iterator[dict | str]:
    with open(path, encoding="utf-8-sig") as stream:
        for line in stream:
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    row = None
                yield row if isinstance(row, dict) else "not a JSON object"


_READERS = {".csv": read_csv, ".tsv": read_csv, ".parquet": read_table, ".jsonl": _jsonl}
