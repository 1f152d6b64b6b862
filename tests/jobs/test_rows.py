"""Files of typed rows: what an earlier version wrote comes back byte for byte; wrong columns are refused."""

import json
from pathlib import Path
from typing import get_type_hints

import pytest

from jobs.core.facts import check_facts
from jobs.core.rows import Rows
from jobs.reporting.summary import SUMMARY
from jobs.scoring.rows import ANSWERS
from jobs.searching.joint_table import JOINT, read_joint, write_joint
from jobs.searching.table import ROWS
from tests.jobs.commands import ROOT

WRITTEN = ROOT / "tests" / "data" / "rows"  # on derm-tiny, before the rows had types


@pytest.mark.parametrize("rows", [SUMMARY, ROWS], ids=str)
def test_rows_come_back_byte_for_byte(tmp_path, rows: Rows):
    found = rows.read(WRITTEN)
    assert len(found) == 2
    assert rows.write(tmp_path, found).read_bytes() == (WRITTEN / rows).read_bytes()


def test_the_joint_file_comes_back_byte_for_byte(tmp_path):
    found = read_joint(WRITTEN)
    assert found is not None and len(found["candidates"]) == len(found["tried"]) == 2
    assert write_joint(tmp_path, found).read_bytes() == (WRITTEN / JOINT).read_bytes()


def test_a_joint_file_of_older_code_is_not_read(tmp_path):
    old = json.loads((WRITTEN / JOINT).read_text())
    del old["candidates"][1]["score_kind"]
    (tmp_path / JOINT).write_text(json.dumps(old))
    assert read_joint(tmp_path) is None and read_joint(tmp_path / "nowhere") is None


def test_a_table_comes_back(tmp_path):
    row = dict.fromkeys(get_type_hints(ANSWERS.kind), "text") | {"token_ids": [1, 2], "tokens": 2, "group": 3}
    path = ANSWERS.write(tmp_path, [row])
    assert path == tmp_path / ANSWERS == tmp_path / "answers.parquet" and str(ANSWERS) == "answers.parquet"
    assert ANSWERS.read(str(tmp_path)) == [row] and ANSWERS.by_sample(tmp_path) == {"text": row}


def test_wrong_columns_are_refused_and_nothing_is_written(tmp_path):
    rows = SUMMARY.read(WRITTEN)
    with pytest.raises(AssertionError, match=r"SummaryRow has no \['ms_per_tokens'\]"):
        SUMMARY.write(tmp_path, [{**rows[0], "ms_per_tokens": 1.0}])
    with pytest.raises(AssertionError, match=r"SummaryRow lacks \['method'\]"):
        SUMMARY.write(tmp_path, [{key: value for key, value in rows[0].items() if key != "method"}])
    assert not list(Path(tmp_path).iterdir())
    with pytest.raises(AssertionError, match=r"PruneFacts has no \['layer'\]"):
        check_facts("prune", {"removed": [1], "layer": 9})
