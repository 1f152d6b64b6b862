"""The command jobs.judge: tables of every format, ratings by people, the endpoint, and mistakes in them."""

import asyncio
import csv
import dataclasses
import json
import math
import os
import shlex
import signal
import sys
import threading

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

import actors.judge.local
from actors.judge.endpoint import JudgeEndpoint
from cluster.tables import read_table, write_table
from jobs import judge
from jobs.core.command import main
from jobs.judging import agreement
from jobs.judging.answer_tables import read_answers
from jobs.judging.tables import clusters
from tests.jobs.judging import IDENTITY, Mock, answer_rows, fair
from tests.judging import save_tiny_judge


def command(monkeypatch, capsys, folder, *arguments: str) -> tuple[int, str, str]:
    """Run jobs.judge as its command line does."""
    options = {"tables": "judge.tables", "agreement": "judge.agreement", "serve": "judge.serve"}
    monkeypatch.setattr(sys, "argv", ["judge", "--run_dir", str(folder / "run"), "--judge.engine", "vllm", *arguments])
    code = 0
    try:
        main(judge.__doc__ or "", judge.job, options)
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def write_csv(path, rows: list[dict]) -> None:
    with open(path, "w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def test_tables_of_every_format(tmp_path, monkeypatch, capsys):
    """CSV, Parquet, JSONL with common sample_ids: judged beside the inputs, compared with the first, printed."""
    Mock().install(monkeypatch)
    first, second, third = (answer_rows(40, share, seed) for seed, share in enumerate((1.0, 0.3, 1.0)))
    write_csv(tmp_path / "a.csv", first)
    write_table(tmp_path / "b.parquet", second)
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps(row) for row in third))
    before = {path.name: path.read_bytes() for path in sorted(tmp_path.iterdir())}
    paths = ", ".join(str(tmp_path / name) for name in before)
    code, out, err = command(monkeypatch, capsys, tmp_path, "--tables", f"[{paths}]")
    assert f"verdicts are in {tmp_path}/b.judged.parquet" in err and str(tmp_path) not in out
    assert code == 0 and {name: (tmp_path / name).read_bytes() for name in before} == before
    rows = read_table(tmp_path / "b.judged.parquet")
    assert len(rows) == 120 and rows[5]["judge_label"] == fair("", rows[5]["reference"], rows[5]["answer"])
    found = {name: json.loads((tmp_path / f"{name}.judged.json").read_text()) for name in "abc"}
    assert [found[name]["judge_difference_finding"] for name in "abc"] == [None, "worse", "identical"]
    assert found["b"]["judge_pct"] == found["b"]["tally"]["judge_pct"] < 70 and found["b"]["skipped"] == []
    lines = [line.split() for line in out.splitlines()]
    assert next(line for line in lines if line[:1] == ["b.parquet"])[1] == "120/120"
    assert "worse:" in out and "identical" in out and "uncalibrated" in out and "over 40 series of images" in out


def test_a_table_with_the_three_columns_alone(tmp_path, monkeypatch, capsys):
    """Empty answers are answers; what is missing is listed; the unit is the answer, and the table says so."""
    Mock().install(monkeypatch)
    lines = [
        {"question": "What?", "reference": "It is eczema", "answer": ""},
        {"question": "What?", "reference": "It is eczema", "answer": None},
        {"question": "What?", "answer": "It is eczema"},
        {"question": "What?", "reference": " ", "answer": "x"},
        {"question": "What?", "reference": "It is eczema", "answer": 4},
        {"question": "What?", "reference": "It is eczema", "answer": "half a \ud83d character of eczema"},
    ]
    text = "\n".join(json.dumps(line) for line in lines)
    (tmp_path / "a.jsonl").write_text(text + "\nno JSON\n[1]\n")
    code, out, err = command(monkeypatch, capsys, tmp_path, "--tables", f"[{tmp_path}/a.jsonl]")
    assert code == 0
    assert [row["judge_label"] for row in read_table(tmp_path / "a.judged.parquet")] == [0, 2]
    found = json.loads((tmp_path / "a.judged.json").read_text())
    assert [(one["row"], one["reason"]) for one in found["skipped"]] == [
        (2, "answer is null"),
        (3, "reference is null"),
        (4, "reference is empty"),
        (5, "answer is not text but int"),
        (7, "not a JSON object"),
        (8, "not a JSON object"),
    ]
    assert "no image column" in out and "6 rows skipped in all" in err and "other_class" in out


def test_a_parquet_file_that_is_damaged_inside(tmp_path, monkeypatch, capsys):
    """Its end is whole, so that it passes for Parquet; its pages are not."""
    Mock().install(monkeypatch)
    write_table(tmp_path / "a.parquet", answer_rows(2))
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[4:200] = b"\xff" * 196
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(OSError):
        read_table(tmp_path / "a.parquet")
    code, _, err = command(monkeypatch, capsys, tmp_path, "--tables", f"[{tmp_path}/a.parquet]")
    assert code == 2 and "a.parquet" in err and "cannot be read" in err and "Traceback" not in err


def test_what_pandas_writes_for_nothing_is_nothing(tmp_path):
    """NaN in JSON lines: no image, no series, and so no common cluster of all that have none."""
    rows = [{"question": "q", "reference": "r", "answer": "a", "image": math.nan, "group": math.nan}] * 2
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    found = read_answers(str(tmp_path / "a.jsonl")).rows
    assert [(row["image"], row["group"]) for row in found] == [(None, None)] * 2
    assert clusters(found) == (["answer 0", "answer 1"], "answer")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", "question,reference,text\nWhat?,x,y\n", ["a.csv", "answer", "question, reference, text"]),
        ("a.csv", "", ["a.csv", "none"]),
        ("a.csv", "question,reference,answer\n", ["a.csv"]),
        ("a.jsonl", "{}\n", ["a.jsonl", "question, reference, answer"]),
        ("a.parquet", "no parquet", ["a.parquet", "cannot be read"]),
        ("a.txt", "x", ["a.txt", ".csv, .tsv, .parquet, .jsonl"]),
        (None, "", ["no table", "a.csv"]),
    ],
)
def test_tables_that_cannot_be_read(tmp_path, monkeypatch, capsys, name, content, says):
    mock = Mock().install(monkeypatch)
    if name:
        (tmp_path / name).write_text(content)
    code, _, err = command(monkeypatch, capsys, tmp_path, "--tables", f"[{tmp_path}/{name or 'a.csv'}]")
    assert code == 2 and mock.asked == [] and "Traceback" not in err
    for word in says:
        assert word in err


def test_mistakes_on_the_command_line(tmp_path, monkeypatch, capsys):
    Mock().install(monkeypatch)
    code, _, err = command(monkeypatch, capsys, tmp_path, "--judge.engine", "none")
    assert code == 2 and "judge.engine is none" in err
    write_csv(tmp_path / "a.csv", answer_rows(2))
    write_table(tmp_path / "a.parquet", answer_rows(2))
    code, _, err = command(monkeypatch, capsys, tmp_path, "--tables", f"[{tmp_path}/a.csv, {tmp_path}/a.parquet]")
    assert code == 2 and "different names" in err
    write_table(tmp_path / "a.judged.parquet", answer_rows(2))
    (tmp_path / "x").mkdir()
    code, _, err = command(
        monkeypatch, capsys, tmp_path, "--tables", f"[{tmp_path}/a.csv, {tmp_path}/x/../a.judged.parquet]"
    )
    assert code == 2 and "would overwrite" in err and len(read_table(tmp_path / "a.judged.parquet")) == 6
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    code, _, err = command(monkeypatch, capsys, tmp_path, "--tables", "[a.csv]")
    assert code == 2 and "absolute path" in err


def test_serving_ends_with_ctrl_c(tmp_path, monkeypatch, capsys):
    """The URL, how to use it, and a clean end."""
    Mock().install(monkeypatch)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    code, out, err = command(monkeypatch, capsys, tmp_path, "--serve", "--judge.model", "the-judge")
    assert code == 0 and err.endswith("judge: stopped\n")
    assert "the-judge answers at http://127.0.0.1:1/v1 until Ctrl-C" in out
    assert "--judge.engine openai --judge.url http://127.0.0.1:1/v1 --judge.model the-judge" in out
    words = shlex.split(next(line for line in out.splitlines() if "curl" in line))
    assert words[:2] == ["curl", "http://127.0.0.1:1/v1/chat/completions"]
    monkeypatch.setattr(actors.judge.local, "LONGEST_TEXT", 4)
    settings = {"revision": None, "dtype": "float32", "trust_remote_code": False, "gpus": 0, "batch": 1}
    served = JudgeEndpoint("the-judge", path=save_tiny_judge(tmp_path / "judge"), max_length=4096, **settings)
    status, answer = asyncio.run(served.http("POST", "/v1/chat/completions", words[-1].encode()))
    assert status == 200 and answer["choices"][0]["message"]["content"]


def test_tables_that_cannot_be_compared(tmp_path, monkeypatch, capsys):
    """A repeated sample_id; or other questions under the same ones."""
    Mock().install(monkeypatch)
    rows = answer_rows(3)
    write_csv(tmp_path / "a.csv", rows)
    write_csv(tmp_path / "b.csv", [*rows, rows[0]])
    write_csv(tmp_path / "c.csv", [{**row, "question": "Other?"} for row in rows])
    _, out, _ = command(monkeypatch, capsys, tmp_path, "--tables", f"[{tmp_path}/a.csv, {tmp_path}/b.csv]")
    assert "not compared: b.csv" in out
    _, out, _ = command(monkeypatch, capsys, tmp_path, "--tables", f"[{tmp_path}/a.csv, {tmp_path}/c.csv]")
    assert (
        "identical" not in out and json.loads((tmp_path / "c.judged.json").read_text())["judge_difference_pairs"] == 0
    )


def rated(folder, rows: list[dict], **columns) -> None:
    """Write ratings.csv: rater A agrees with the fair judge, B gives one more where there is one more."""
    given = [fair("", row["reference"], row["answer"]) for row in rows]
    both = [{**row, "rater": "A", "rating": label} for row, label in zip(rows, given, strict=True)]
    both += [{**row, "rater": "B", "rating": min(4, label + 1)} for row, label in zip(rows, given, strict=True)]
    write_csv(folder / "ratings.csv", [{**row, **columns} for row in both])


def test_agreement_with_people(tmp_path, monkeypatch, capsys):
    """Two raters who bring the answers: from then on this judge's tables say so, and another judge's do not."""
    Mock().install(monkeypatch)
    rows = answer_rows(20, 0.5)
    labels = np.array([fair("", row["reference"], row["answer"]) for row in rows])
    rated(tmp_path, rows)
    code, out, err = command(monkeypatch, capsys, tmp_path, "--agreement", f"{tmp_path}/ratings.csv")
    assert code == 0, err
    found = json.loads((tmp_path / "run" / agreement.FILE).read_text())
    assert (found["raters"], found["answers"], found["clusters"], found["unscored"]) == (2, 60, 20, 0)
    assert found["signed_error"] == pytest.approx(-0.5 * np.mean(labels < 4))
    kappa = cohen_kappa_score(labels, np.minimum(labels + 1, 4), labels=range(5), weights="quadratic")
    assert found["people_kappa"] == pytest.approx(kappa) and found["kappa"] == pytest.approx((1 + kappa) / 2)
    assert "people among themselves" in out and "uncalibrated" not in out and "ratings.csv" in out
    write_csv(tmp_path / "a.csv", rows)
    _, out, _ = command(monkeypatch, capsys, tmp_path, "--tables", f"[{tmp_path}/a.csv]")
    assert "against 60 answers rated by people" in out and "uncalibrated" not in out
    Mock().install(monkeypatch, dataclasses.replace(IDENTITY, revision="another"))
    _, out, _ = command(monkeypatch, capsys, tmp_path, "--tables", f"[{tmp_path}/a.csv]")
    assert "uncalibrated" in out


def test_ratings_of_several_models_answers_under_one_sample_id(tmp_path, monkeypatch, capsys):
    """The right, the half right and the wrong answer to each question, rated as the judge judges them: no error."""
    Mock().install(monkeypatch)
    answers = ("The name is eczema", "It is eczema", "No idea")
    rows = [
        {"sample_id": str(n), "question": "What is it?", "reference": answers[0], "answer": said, "rating": rating}
        for n in range(4)
        for said, rating in zip(answers, (4, 2, 0), strict=True)
    ]
    write_csv(tmp_path / "r.csv", [*rows, rows[0]])  # two models answered alike
    code, _, err = command(monkeypatch, capsys, tmp_path, "--agreement", f"{tmp_path}/r.csv")
    assert code == 0, err
    found = json.loads((tmp_path / "run" / agreement.FILE).read_text())
    assert (found["answers"], found["clusters"]) == (12, 4)
    assert (found["kappa"], found["signed_error"]) == (1.0, 0.0)


def test_agreement_by_sample_id(tmp_path, monkeypatch, capsys):
    """The ratings name answers of the first table; an answer that is not there is a mistake."""
    Mock().install(monkeypatch)
    rows = answer_rows(10, 0.5)
    write_csv(tmp_path / "a.csv", rows)
    lines = [f"{row['sample_id']},{fair('', row['reference'], row['answer'])}" for row in rows[:20]]
    (tmp_path / "r.csv").write_text("\n".join(["sample_id,rating", *lines]))
    arguments = ("--tables", f"[{tmp_path}/a.csv]", "--agreement", f"{tmp_path}/r.csv")
    code, out, err = command(monkeypatch, capsys, tmp_path, *arguments)
    assert code == 0 and "against 20 answers rated by people: weighted kappa 1.00 [1.00, 1.00]" in out, err
    assert json.loads((tmp_path / "a.judged.json").read_text())["judge_agreement"]["signed_error"] == 0
    (tmp_path / "r.csv").write_text("\n".join(["sample_id,rating", *lines, "elsewhere,4"]))
    code, _, err = command(monkeypatch, capsys, tmp_path, *arguments)
    assert code == 2 and "'elsewhere'" in err
    (tmp_path / "r.csv").write_text("\n".join(["sample_id,rating", *lines]))
    write_csv(tmp_path / "a.csv", [*rows, {**rows[3], "answer": "another"}])
    code, _, err = command(monkeypatch, capsys, tmp_path, *arguments)
    assert code == 2 and "'1:name', which several" in err and "question, reference, answer" in err


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ("sample_id,rating\na,5", "'5' is not a whole number"),
        ("sample_id,rating\na,good", "'good' is not a whole number"),
        ("sample_id,rating\na,2.5", "'2.5' is not a whole number"),
        ("rating,answer\n3,x", "sample_id, or question, reference, answer"),
        ("sample_id,score\na,3", "lacks the columns rating"),
        ("question,reference,answer,rating\nq,r,a,3\nq,r,a,4", "rated before"),
    ],
)
def test_ratings_with_mistakes(tmp_path, monkeypatch, capsys, lines, says):
    Mock().install(monkeypatch)
    (tmp_path / "r.csv").write_text(lines)
    code, _, err = command(monkeypatch, capsys, tmp_path, "--agreement", f"{tmp_path}/r.csv")
    assert code == 2 and says in err and "Traceback" not in err
