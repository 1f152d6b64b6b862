"""What is said and what is a result: standard error and standard output, flags, JSON lines, terminals."""

import io
import json
import logging
import re
import sys

import pytest
from tqdm import tqdm

from jobs import demo
from jobs.core import command, logs
from jobs.core.progress import Progress
from jobs.core.stage import Stage
from tests.jobs.commands import CONFIG
from tests.tiny import DERM_TINY

LOG = logging.getLogger("jobs.ranking")
LONG = "/shared/" + 12 * "long-names/" + "artifacts"


@pytest.fixture(autouse=True)
def as_before():
    yield
    logs.configure()


def said(monkeypatch, capsys, tmp_path, *flags: str) -> tuple[str, str]:
    """What a job says with these flags that logs at every level and prints one result."""

    def job(run) -> None:
        LOG.debug("looked at layer 3")
        LOG.info("ablate: computing", extra={"artifact": tmp_path / "ablate-1"})
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
    assert out == "rank  layer\n" and "looked at layer 3" in err and len(err.splitlines()) == 5
    assert f"the resolved config is in {tmp_path}" in err


def test_json_lines(monkeypatch, capsys, tmp_path):
    out, err = said(monkeypatch, capsys, tmp_path, "--log-json", "--verbose")
    lines = [json.loads(line) for line in err.splitlines()]
    assert out == "rank  layer\n"
    assert [(line["level"], line["logger"]) for line in lines] == [
        ("debug", "jobs.core"),
        ("debug", "jobs.ranking"),
        ("info", "jobs.ranking"),
        ("warning", "jobs.ranking"),
        ("info", "jobs.core"),
    ]
    assert lines[2]["message"] == "ablate: computing" and re.match(r"\d{4}-\d\d-\d\dT", lines[2]["time"])
    assert set(lines[3]) == {"time", "level", "logger", "message"}
    assert lines[2]["artifact"] == str(tmp_path / "ablate-1") and (lines[4]["done"], lines[4]["total"]) == (1, 2)


@pytest.mark.parametrize("log_json", [False, True])
def test_an_exception_has_its_traceback(capsys, log_json):
    logs.configure(log_json=log_json)
    try:
        raise KeyError("layer 3")
    except KeyError:
        LOG.exception("ablate: failed")
    err = capsys.readouterr().err
    text = json.loads(err)["traceback"] if log_json else err.removeprefix("ablate: failed\n")
    assert text.startswith("Traceback") and text.rstrip().endswith("KeyError: 'layer 3'")


def test_flags_are_no_config(monkeypatch, capsys, tmp_path):
    """They are not in the recorded config, and change no artifact's name, not even of a stage that reads all of it."""
    recorded, names = [], []
    for flags in ([], ["--quiet"], ["--verbose", "--log_json"]):
        said(monkeypatch, capsys, tmp_path, *flags)
        (path,) = tmp_path.glob("config.*.yaml")
        recorded.append(path.read_text())
        command.main("doc", lambda run: names.append(Stage("toy", 1, run.config.model_dump(), (), print).name))
    assert len(set(recorded)) == 1 and len(set(names)) == 1
    assert "quiet" not in recorded[0] and "verbose" not in recorded[0] and "log_json" not in recorded[0]


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
        LOG.warning(f"ablate: scores and figure are in {LONG}")
        LOG.error(
            "ablate: a sentence that is longer than a terminal of eighty columns is wide is not broken into lines"
        )
    text = terminal.getvalue()
    before, after = text.split("ablate: computing [scores]")
    assert "INFO" in before and re.search(r"\d\d:\d\d:\d\d", before)
    assert "0/2" in before and "1/2" in after
    assert "WARNING" in after and f"scores and figure are in {LONG}\n" in after
    assert "a sentence that is longer than a terminal of eighty columns is wide is not broken into lines" in after


def test_into_a_file(capsys, tmp_path):
    path = tmp_path / "stage.txt"
    path.write_text("before\n")
    logs.configure(quiet=True)
    with logs.into_file(path, {"verbose": True}):
        LOG.info("prune: computing")
        LOG.debug("prune: looked")
        print("printed")
    LOG.info("prune: computed")
    LOG.warning("prune: short of memory")
    lines = path.read_text().splitlines()
    assert lines[0] == "before" and lines[1].endswith("prune: computing")
    assert lines[2].endswith("prune: looked") and lines[3:] == ["printed"]
    assert "short of memory" in (err := capsys.readouterr().err) and "comput" not in err


def test_json_on_a_terminal_has_no_bar(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    logs.configure(log_json=True)
    with Progress("ablate", 1) as progress:
        progress.step()
    (line,) = terminal.getvalue().splitlines()
    assert json.loads(line)["message"] == "ablate: 1/1 done in 0 s"


@pytest.mark.parametrize("flags", [{}, {"verbose": True}])
def test_the_demo_passes_on_what_jobs_log(capsys, flags):
    """Their notices, progress and every warning; tables and what Ray says only if more is asked for."""
    logs.configure(**flags)
    progress = "greedy 2/6: 3/12 (0.2/s, 45 s left) note"
    for line in ("prune: computing", "WARNING replicas: 3 wanted", progress):
        demo.relay(f"12:00:00 {line}\n")
    demo.relay("Job 'a' submitted\n")
    lines = [line.split(" ", 1)[1] for line in capsys.readouterr().err.splitlines()]
    assert lines[:3] == ["  prune: computing", "WARNING   replicas: 3 wanted", f"  {progress}"]
    assert lines[3:] == (["  Job 'a' submitted"] if flags else [])
