"""Tables of plain rows in Parquet: written whole, or part by part as results come."""

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.text import one_line

LOG = logging.getLogger("cluster")


def write_table(path: Path, rows: Sequence[Mapping], schema: pa.Schema | None = None) -> None:
    """Write rows as one Parquet file, atomically; an empty table needs a `schema`."""
    table = pa.Table.from_pylist(list(rows), schema=schema)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)
    os.replace(temporary, path)


def read_table(path: Path) -> list[dict]:
    """Read all rows of one Parquet file; pa.ArrowException or OSError: it is damaged."""
    return pq.read_table(path, page_checksum_verification=True).to_pylist()


class PartTable:
    """A table that grows by parts, one file per finished unit: a crash loses at most the unit in flight."""

    def __init__(self, folder: Path):
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def finished(self) -> set[str]:
        """Return the names of the units already written."""
        return {path.stem for path in self._folder.glob("*.parquet")}

    def add(self, unit: str, rows: Sequence[Mapping]) -> None:
        """Write one unit's rows; a unit written twice is the same file."""
        write_table(self._folder / f"{unit}.parquet", rows)

    def all_rows(self) -> list[dict]:
        """Return the rows of all units ever written."""
        return self.rows(sorted(self.finished()))

    def rows(self, units: Iterable[str]) -> list[dict]:
        """Return the rows of those named units that are written, in the order of the names.

        Units of an earlier run that divided the work differently are left out: they hold the same samples.
        """
        paths = [self._folder / f"{unit}.parquet" for unit in units]
        return [row for path in paths if path.exists() for row in self._read_or_remove(path)]

    def _read_or_remove(self, path: Path) -> list[dict]:
        """Return a unit's rows; a damaged file is removed, so that its unit is done again."""
        try:
            return read_table(path)
        except (pa.ArrowException, OSError, ValueError) as error:
            LOG.warning(f"{path} is damaged, and its rows are made again: {one_line(error)}")
            path.unlink(missing_ok=True)
            return []
