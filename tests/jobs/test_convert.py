"""The command that makes a stock LLaVA of another repository's checkpoint."""

import sys

import pytest

from jobs import convert
from tests import bunny
from tests.tiny import plain_model


def test_a_bunny_is_converted_once(tmp_path, monkeypatch, capsys):
    source, out = bunny.save_bunny(tmp_path), tmp_path / "stock"
    monkeypatch.setattr(sys, "argv", ["convert", str(source), "--out", str(out)])
    convert.main()
    assert capsys.readouterr().out == f"{out}\n" and plain_model(str(out))
    with pytest.raises(SystemExit):
        convert.main()
    assert "exists: give another folder, or delete it" in capsys.readouterr().err
    (source / "config.json").unlink()
    monkeypatch.setattr(sys, "argv", ["convert", str(source), "--out", str(tmp_path / "other")])
    with pytest.raises(SystemExit) as end:
        convert.main()
    assert end.value.code == 2 and "config.json' cannot be read" in capsys.readouterr().err
