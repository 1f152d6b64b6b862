"""A random judge on Ray Serve: it survives the death of a replica, asks nothing twice, and is found out."""

import json
import os
import signal
from pathlib import Path

import psutil
import pytest

import jobs.judging.engine
from cluster.tables import PartTable, read_table
from jobs import judge
from jobs.judging.answer_tables import read_answers
from jobs.judging.asking import VerdictStore
from jobs.judging.tables import remarks
from tests.jobs.judging import DISEASES, evaluation, run_in
from tests.judging import save_tiny_judge

pytestmark = pytest.mark.usefixtures("private_ray")


@pytest.fixture(scope="module")
def tiny_judge(tmp_path_factory) -> str:
    return save_tiny_judge(tmp_path_factory.mktemp("judge"))


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    from ray import serve

    serve.shutdown()


def served_run(folder: Path, model: str):
    """Return a run with the tiny judge on two CPU replicas of one core."""
    options = {"model": model, "dtype": "float32", "gpus": 0, "cpus": 1, "replicas": 2, "controls": 1}
    return run_in(folder, *((f"judge.{key}", str(value)) for key, value in options.items()))


def rows_of(variant: int, images: int, questions: int) -> list[dict]:
    """Return the answers of one variant, each unlike any other."""
    return [
        {
            "sample_id": f"{image}:{question}",
            "question_id": str(question),
            "image": f"{image}.png",
            "group": str(image),
            "class": DISEASES[image % 4],
            "question": f"Question {question}?",
            "reference": f"Answer {question} is {DISEASES[image % 4]}.",
            "answer": f"Variant {variant} says {DISEASES[(image + variant) % 4]} to {question} of {image}.",
        }
        for image in range(images)
        for question in range(questions)
    ]


def judged(folder: Path, monkeypatch, model: str, variants: int, images: int, kill_after: int) -> tuple[list, list]:
    """Judge all variants with two replicas, one of which is killed after some verdicts; return stages and rows."""
    killed = []
    add = VerdictStore.add

    def counted(self, one):
        add(self, one)
        if len(self.scored) == kill_after:
            replicas = [
                process
                for process in psutil.Process().children(recursive=True)
                if process.name().startswith("ray::ServeRepl")
            ]
            killed.append(min(process.pid for process in replicas))
            os.kill(killed[0], signal.SIGKILL)

    monkeypatch.setattr(VerdictStore, "add", counted)
    with served_run(folder, model) as run:
        models = [evaluation(run, str(n), rows_of(n, images, 3)) for n in range(variants)]
        stages = judge.make_all(run, models)
        rows = [row for one in stages for row in read_table(run.store.root / one.name / judge.VERDICTS)]
        summary = [judge.row(run, one) for one in stages]
    assert len(killed) == 1
    assert len(rows) == variants * images * 3 and len({row["judge_key"] for row in rows}) == len(rows)
    for row in rows:
        assert row["judge_label"] in (0, 1, 2, 3, 4) or (row["judge_label"] is None and row["judge_reason"])
    stored = PartTable(folder / "verdicts").all_rows()
    assert len({row["judge_key"] for row in stored}) == len(stored), "a key was judged twice"
    assert all(one["judge_flagged"] for one in summary) and "FLAGGED" in "\n".join(remarks(summary))
    return models, rows


def asks_nothing(folder: Path, monkeypatch, model: str, models: list) -> None:
    """A second run starts no judge at all; neither does a table of the same answers."""

    def started(run):
        raise AssertionError("the judge was started")

    monkeypatch.setattr(jobs.judging.engine, "judge_engine", started)
    with served_run(folder, model) as run:
        judge.make_all(run, models)
        rows = read_table(run.store.root / judge.stage(run, models[0]).name / judge.VERDICTS)
        texts = [{key: row[key] for key in ("question", "reference", "answer")} for row in rows]
        (folder / "table.jsonl").write_text("\n".join(map(json.dumps, texts)))
        judge.judge_files(run, [read_answers(str(folder / "table.jsonl"))], None)
    again = read_table(folder / "table.judged.parquet")
    assert [row["judge_label"] for row in again] == [row["judge_label"] for row in rows]


@pytest.mark.timeout(240)
@pytest.mark.slow
def test_a_few_answers_and_a_replica_that_dies(tmp_path, monkeypatch, tiny_judge):
    models, rows = judged(tmp_path, monkeypatch, tiny_judge, variants=2, images=2, kill_after=5)
    assert sum(row["judge_label"] is not None for row in rows) >= 11
    assert all(row["judge_label_mass"] > 0 for row in rows if row["judge_label"] is not None)
    asks_nothing(tmp_path, monkeypatch, tiny_judge, models)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_702_verdicts_and_a_replica_that_dies(tmp_path, monkeypatch, tiny_judge):
    """39 images x 3 questions x 6 variants."""
    models, rows = judged(tmp_path, monkeypatch, tiny_judge, variants=6, images=39, kill_after=100)
    assert len(rows) == 702
    asks_nothing(tmp_path, monkeypatch, tiny_judge, models)
