"""CSV files as spreadsheets write them: comma, semicolon or tab; UTF-8, UTF-16 or Windows-1252; any case of names."""

import codecs
import csv
import io
import logging
from collections.abc import Collection
from pathlib import Path

LOG = logging.getLogger("jobs.core")

SEPARATORS = ",;\t"
SPREADSHEETS = (".xlsx", ".xls", ".xlsm", ".ods", ".numbers")
_BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


def read_csv(path: Path) -> list[dict[str, str | None]]:
    """Return the rows of a CSV file by its column names. ValueError: it is not text in any of these encodings.

    OSError, csv.Error: it cannot be read.
    """
    text, encoding = _decode(path)
    if not encoding.startswith("utf-8"):
        LOG.warning(f"{path}: read as {encoding}, since it is not UTF-8")
    separator, skipped = _separator(text)
    csv.field_size_limit(2**31 - 1)
    rows = csv.DictReader(io.StringIO(text[skipped:], newline=""), delimiter=separator)
    return [{key: value for key, value in row.items() if key is not None} for row in rows]


def canonical_columns(columns: Collection[str], known: Collection[str], file: str) -> dict[str, str]:
    """Return {column: its name in `known`} of the columns in `known`; case, spaces, - and _ make no difference.

    ValueError: two columns have the same name.
    """
    names: dict[str, str] = {}
    for column in columns:
        name = "_".join(str(column).replace("_", " ").replace("-", " ").split()).casefold()
        if name in known:
            if name in names.values():
                twice = [key for key, value in names.items() if value == name]
                raise ValueError(f"{file} has the column {name} twice: {twice[0]!r} and {column!r}. Rename one.")
            names[column] = name
    return names


def _decode(path: Path) -> tuple[str, str]:
    """Return a file's text and its encoding."""
    content = path.read_bytes()
    for mark, encoding in _BOMS:
        if content.startswith(mark):
            return content.decode(encoding), encoding
    nulls = content[:1000:2].count(0), content[1:1000:2].count(0)
    if max(nulls) > len(content[:1000]) // 8:  # every second byte of Western text is 0
        encoding = "utf-16-be" if nulls[0] > nulls[1] else "utf-16-le"
        return content.decode(encoding), encoding
    try:
        return content.decode("utf-8"), "utf-8"
    except UnicodeDecodeError:
        return content.decode("cp1252"), "Windows-1252"


def _separator(text: str) -> tuple[str, int]:
    """Return the columns' separator, and how many letters precede the header: Excel may write a line `sep=;`."""
    first = text.partition("\n")[0].rstrip("\r")
    if first.lower().startswith("sep=") and first[4:] and first[4] in SEPARATORS:
        return first[4], text.index("\n") + 1 if "\n" in text else len(text)
    names = "".join(first.split('"')[::2])  # what stands outside quotes
    return max(SEPARATORS, key=names.count), 0
