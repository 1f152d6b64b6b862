"""What is said and what is a result: standard error and standard output, flags, JSON lines, terminals."""

import io
import json
import logging
import re
import sys

import pytest
from tqdm import tqdm

from jobs.core import command, logs
from jobs.core.progress import Progress
from tests.jobs.commands import CONFIG
from tests.tiny import DERM_TINY

LOG = logging.getLogger("jobs.ranking")


@pytest.fixture(autouse=True)
def as_before():
    yield
    logs.configure()


def said(monkeypatch, capsys, tmp_path, *flags: str) -> tuple[str, str]:
    """What a job says with these flags that logs at every level and prints one result."""

    def job(run) -> None:
        LOG.debug("looked at layer 3")
        LOG.info("ablate: computing")
        LOG.warning("ablate: s5 failed")
        with Progress("ablate", 2) as progress:
            progress.step()
        print("rank  layer")

    monkeypatch.setattr(sys, "argv", ["job", "--run_dir", str(tmp_path), "--model.path", str(DERM_TINY), *flags])
    command.main("doc", job)
    return capsys.readouterr()


def test_results_are_printed_and_the_rest_is_said(monkeypatch, capsys, tmp_path):
    out, err = said(monkeypatch, capsys, tmp_path)
    assert out == "rank  layer\n"
    first, second, third = err.splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d ablate: computing", first)
    assert re.fullmatch(r"\d\d:\d\d:\d\d WARNING ablate: s5 failed", second)
    assert re.fullmatch(r"\d\d:\d\d:\d\d ablate: 1/2 done in 0 s", third)


def test_quiet_leaves_warnings_and_verbose_adds(monkeypatch, capsys, tmp_path):
    out, err = said(monkeypatch, capsys, tmp_path, "--quiet")
    assert out == "rank  layer\n" and len(err.splitlines()) == 1 and "s5 failed" in err
    out, err = said(monkeypatch, capsys, tmp_path, "--verbose")
    assert out == "rank  layer\n" and "looked at layer 3" in err and len(err.splitlines()) == 4


def test_json_lines(monkeypatch, capsys, tmp_path):
    out, err = said(monkeypatch, capsys, tmp_path, "--log-json", "--verbose")
    lines = [json.loads(line) for line in err.splitlines()]
    assert out == "rank  layer\n"
    assert [(line["level"], line["logger"]) for line in lines] == [
        ("debug", "jobs.ranking"),
        ("info", "jobs.ranking"),
        ("warning", "jobs.ranking"),
        ("info", "jobs.core"),
    ]
    assert lines[1]["message"] == "ablate: computing" and re.match(r"\d{4}-\d\d-\d\dT", lines[1]["time"])


def test_flags_are_no_config(monkeypatch, capsys, tmp_path):
    """They are not in the recorded config, and so in no artifact's name."""
    said(monkeypatch, capsys, tmp_path, "--verbose", "--log_json")
    (recorded,) = tmp_path.glob("config.*.yaml")
    assert "verbose" not in recorded.read_text() and "log_json" not in recorded.read_text()


@pytest.mark.parametrize("flags", [[], ["--log_json"]])
def test_a_users_mistake_is_one_sentence(monkeypatch, capsys, flags):
    monkeypatch.setattr(sys, "argv", ["job", "--config", CONFIG, "--prune.layer", "2", *flags])
    with pytest.raises(SystemExit) as stop:
        command.main("doc", command.main)
    out, err = capsys.readouterr()
    sentence = json.loads(err)["message"] if flags else err.strip()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1
    assert sentence == (
        "command: Unknown config key 'prune.layer': did you mean 'prune.layers'? (--help lists them all)"
    )


def test_lines_on_a_terminal_leave_the_bar_whole(monkeypatch):
    """A line clears the bar, stands above it, and the bar comes back."""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    logs.configure()
    with tqdm(total=2, file=terminal, desc="ablate") as bar:
        bar.update()
        LOG.info("ablate: computing [scores]")
        LOG.error(
            "ablate: a sentence that is longer than a terminal of eighty columns is wide is not broken into lines"
        )
    text = terminal.getvalue()
    before, after = text.split("ablate: computing [scores]")
    assert "INFO" in before and re.search(r"\d\d:\d\d:\d\d", before)
    assert "0/2" in before and "1/2" in after
    assert "a sentence that is longer than a terminal of eighty columns is wide is not broken into lines" in after


def test_into_a_file(capsys, tmp_path):
    path = tmp_path / "stage.txt"
    path.write_text("before\n")
    with logs.into_file(path):
        LOG.info("prune: computing")
        print("printed")
    LOG.info("prune: computed")
    lines = path.read_text().splitlines()
    assert lines[0] == "before" and lines[1].endswith("prune: computing") and lines[2:] == ["printed"]
    assert "computed" in (err := capsys.readouterr().err) and "computing" not in err
