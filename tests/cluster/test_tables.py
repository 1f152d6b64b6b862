"""Tables: rows come back as they went in, and a part is there once or not at all."""

import pyarrow as pa
import pytest

from cluster.tables import PartTable, read_table, write_table

ROWS = [
    {"question": "q1", "score": 0.5, "layers": [1, 2], "note": None},
    {"question": "q2", "score": -1.0, "layers": [], "note": "é"},
]


def test_rows_come_back(tmp_path):
    write_table(tmp_path / "rows.parquet", ROWS)
    assert read_table(tmp_path / "rows.parquet") == ROWS
    assert [path.name for path in tmp_path.iterdir()] == ["rows.parquet"]


def test_an_empty_table_keeps_its_columns(tmp_path):
    write_table(tmp_path / "rows.parquet", [], pa.schema([("question", pa.string())]))
    assert read_table(tmp_path / "rows.parquet") == []
    assert pa.parquet.read_schema(tmp_path / "rows.parquet").names == ["question"]


def test_a_failed_write_leaves_the_old_table(tmp_path):
    write_table(tmp_path / "rows.parquet", ROWS)
    with pytest.raises(pa.ArrowInvalid):
        write_table(tmp_path / "rows.parquet", [{"score": 1.0}, {"score": "many"}])
    assert read_table(tmp_path / "rows.parquet") == ROWS


def test_parts_grow_and_a_unit_written_twice_is_one(tmp_path):
    table = PartTable(tmp_path / "parts")
    assert (table.finished(), table.rows(["a"])) == (set(), [])
    table.add("0001", [{"key": "b"}])
    table.add("0000", [{"key": "a"}, {"key": "a2"}])
    table.add("0001", [{"key": "b"}])
    assert table.finished() == {"0000", "0001"}
    assert table.rows(["0000", "0001"]) == [{"key": "a"}, {"key": "a2"}, {"key": "b"}]
    assert table.rows(["0001", "0002"]) == [{"key": "b"}]  # only what this run's plan names


def test_a_new_process_goes_on_where_the_old_one_stopped(tmp_path):
    PartTable(tmp_path / "parts").add("0000", [{"key": "a"}])
    (tmp_path / "parts" / ".0001.parquet.4711").write_bytes(b"half a file")
    table = PartTable(tmp_path / "parts")
    assert table.finished() == {"0000"}
    table.add("0002", [{"key": "c"}])
    assert table.rows(["0000", "0001", "0002"]) == [{"key": "a"}, {"key": "c"}]


def test_parts_may_differ_in_their_columns(tmp_path):
    table = PartTable(tmp_path / "parts")
    table.add("0000", [{"key": "a", "error": None}])
    table.add("0001", [{"key": "b", "error": "out of memory", "tries": 3}])
    assert table.rows(["0000", "0001"])[1] == {"key": "b", "error": "out of memory", "tries": 3}
    assert table.rows(["0000"])[0]["error"] is None
