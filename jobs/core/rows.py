"""Files of typed rows: each kind is read and written by one object, which knows its name and its columns."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

import pyarrow as pa

from cluster.artifacts import write_text
from cluster.tables import read_table, write_table

Row = TypeVar("Row", bound=Mapping)
T = TypeVar("T")
Maybe: TypeAlias = T | Any  # T, or None where nothing was measured: the row's status says so


class Rows(Generic[Row]):
    """A file of rows in a folder: Parquet, or JSON where its name ends so. `kind`: the TypedDict of a row.

    In paths it is its name: `folder / ANSWERS`. schema: of the columns, for Parquet files that may be empty.
    """

    def __init__(self, name: str, kind: type[Row], schema: pa.Schema | None = None):
        self.name, self.kind, self._schema = name, kind, schema

    def __fspath__(self) -> str:
        return self.name

    def __str__(self) -> str:
        return self.name

    def write(self, folder: Path, rows: Sequence[Row]) -> Path:
        """Write all rows, atomically, and return the file."""
        path = folder / self.name
        check_rows(rows, self.kind)
        if path.suffix == ".json":
            write_text(path, json.dumps(rows, indent=1))
        else:
            write_table(path, rows, self._schema)
        return path

    def read(self, folder: str | Path) -> list[Row]:
        """Return all rows; ValueError: the file is damaged."""
        path = Path(folder) / self.name
        try:
            rows: list[Any] = json.loads(path.read_text()) if path.suffix == ".json" else read_table(path)
        except (pa.ArrowException, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"{path} is damaged ({reason}): remove it; the job that wrote it writes it again."
            ) from None
        return rows

    def by_sample(self, folder: str | Path) -> dict[str, Row]:
        """Return the rows by their sample_id."""
        return {row["sample_id"]: row for row in self.read(folder)}


def check_rows(rows: Sequence[Mapping], kind: type) -> None:
    """Assert that every row has the required keys of a TypedDict, and no others than its optional ones."""
    required: frozenset[str] = getattr(kind, "__required_keys__")  # noqa: B009
    allowed = required | getattr(kind, "__optional_keys__")  # noqa: B009
    for row in rows:
        assert row.keys() >= required, f"{kind.__name__} lacks {sorted(required - row.keys())}"
        assert row.keys() <= allowed, f"{kind.__name__} has no {sorted(row.keys() - allowed)}"
