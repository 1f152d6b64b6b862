"""A search whose answers a judge scores in earnest, the mock judge; its stages are files that cost nothing."""

import json
import re

import pytest

from actors.judge.calls import Failure
from jobs import search
from jobs.searching.budget import compare_rows
from jobs.searching.joint_table import JointRow
from jobs.searching.rows import read_rows
from tests.jobs.judging import (
    DISEASES,
    Mock,
    fair,
    hurried,  # noqa: F401 (a fixture)
)
from tests.jobs.searching import Factory, names, new_run

WRONG = {"original": 0, "lora": 12, "awq 4 bit": 24, "lora, awq 4 bit": 36}  # of sixty answers
OPTIONS = {
    "search__depths": "[0]",
    "search__screen_images": "null",
    "judge__engine": "transformers",
    "judge__controls": "100",
}
ODD = "Number 60 is secret"  # which only one setting was asked about


def spoken(label: str, images: int, share: float) -> list[dict]:
    """Three answers to each image; the wrong ones say only the last word of the reference."""
    rows = []
    for number in range(3 * images):
        disease = DISEASES[number % 4]
        reference = f"Number {number} is {disease}"
        answer = reference if number >= WRONG[label] else f"{label}, number {number}: {disease}"
        rows.append({"sample_id": str(number), "group": str(number // 3), "class": disease, "reference": reference,
                     "answer": answer, "question": "What is it?", "baseline": 1.0})  # fmt: skip
    odd = {**rows[0], "sample_id": "60", "class": "other", "reference": ODD, "answer": "no idea"}
    return [*rows, odd] if label == "lora" else rows


def judge_of(monkeypatch, unscored: int) -> Mock:
    """Refuse so many answers of one setting; give the odd reference 3 where it must get 4."""

    def before(question, reference, candidate):
        refused = [f"awq 4 bit, number {number}:" for number in range(unscored)]
        return Failure("refused", "too long") if candidate.startswith(tuple(refused)) else None

    def label(question, reference, candidate):
        return 3 if candidate == reference == ODD else fair(question, reference, candidate)

    return Mock(label, before).install(monkeypatch)


@pytest.fixture
def factory(monkeypatch):
    made = Factory(monkeypatch)
    made.answers = spoken
    return made


def line_of(text: str, start: str, holds: str) -> str:
    (found,) = [line for line in text.splitlines() if line.startswith(start) and holds in line]
    return " ".join(found.split())


def test_the_judges_scores_decide_and_carry_what_they_must(factory, tmp_path, monkeypatch, capsys):
    """The baseline has all alike; one setting's controls are missed, one has an answer UNSCORED."""
    judge_of(monkeypatch, unscored=1)
    search.job(new_run(tmp_path, **OPTIONS))
    rows = {row["setting"]: row for row in read_rows(new_run(tmp_path))}
    assert {row["score_kind"] for row in rows.values()} == {"judge"}
    assert [name for name, row in rows.items() if row["judge_flagged"]] == ["lora"]
    said = capsys.readouterr().out
    assert "answer for no limit: original: 100.0 [100.0, 100.0] (LLM judge), " in said
    assert "runner-up: lora: 88.5 [" in said and " (LLM judge, flagged), " in said
    assert "difference: +10.0 points [" in said
    assert "]! " in line_of(said, "lora ", " done ") and "!" not in line_of(said, "awq 4 bit ", " done ")
    assert re.match(r"lora 61/61 88\.5 \[\d+, \d+\]! \[88\.5, 88\.5\]", line_of(said, "lora ", "61/61"))
    partly = line_of(said, "awq 4 bit ", "59/60")
    assert re.match(r"awq 4 bit 59/60 80\.5 \[\d+, \d+\] \[79\.2, 80\.8\]", partly)
    assert "uncalibrated" in said and "240 of 241 answers scored, of 4 settings" in said
    assert "UNSCORED: 1 refused" in said
    assert "! FLAGGED: the judge failed controls and is not to be trusted: reference 1 of 61" in said
    assert "no headline" not in said and "not run" not in said

    difference = compare_rows(new_run(tmp_path), rows["original"], rows["awq 4 bit"])
    assert difference["difference_pairs"] == 59 and difference["difference_finding"] == "better"
    assert difference["difference_pct"] == pytest.approx(100 * 23 * 2 / (59 * 4))

    page = (tmp_path / "search" / "report.html").read_text()
    assert "marked ! are flagged and not to be trusted" in page and "uncalibrated" in page
    assert '<th scope="row">awq 4 bit</th><td>80.5 [' in page and "<td>59/60</td><td>79.2 to 80.8</td>" in page
    assert page.count("] !</td>") == 2 and "<td>1 of 427</td>" in page  # the score of one setting, in two tables


def test_a_flagged_choice_of_the_joint_search_is_shown_so(factory, tmp_path, monkeypatch):
    judge_of(monkeypatch, unscored=0)
    search.job(new_run(tmp_path, **OPTIONS, search__recoveries="[lora]", search__quantizers="[none]"))
    (row,) = read_rows(new_run(tmp_path))
    choice = {"method": "joint 1", "choice": [4, 0], "predicted": None, "kl": 0.5, "estimate_bytes": 2**20}
    choice |= {"best_uniform": True, "difference_finding": None}
    added = {"choices": 1, "mean_predicted": 0.25, "mean_measured": 0.5, "spearman": None}
    made = {**dict.fromkeys(JointRow.__required_keys__), **row, **choice}
    joint = {"budget_bytes": 2**20, "damage": "kl", "additivity": added, "candidates": [made]}
    (tmp_path / "joint.json").write_text(json.dumps(joint))
    search.job(new_run(tmp_path, search__resolve_only="true"))
    page = (tmp_path / "search" / "report.html").read_text().partition("A choice for every layer")[2]
    assert re.search(r'<th scope="row">joint 1</th><td>88\.5 \[[^<]*\] !</td>\s*<td>61/61</td><td>88\.5 to 88\.5', page)
    assert "! FLAGGED" in page and "uncalibrated" in page and page.count("] !</td>") == 2


def test_which_rows_have_no_headline_and_what_decides_then(factory, tmp_path, monkeypatch, capsys):
    judge_of(monkeypatch, unscored=2)
    search.job(new_run(tmp_path, **OPTIONS))
    rows = {row["setting"]: row for row in read_rows(new_run(tmp_path))}
    assert {row["score_kind"] for row in rows.values()} == {"baseline"} and rows["awq 4 bit"]["judge_pct"] is None
    said, told = capsys.readouterr().out, "no headline for awq 4 bit, so all are compared by the baseline"
    assert told in said and " none " in line_of(said, "awq 4 bit ", "58/60")
    assert "answer for no limit: awq 4 bit: 100.0" in said and "(baseline, no LLM judge)" in said
    assert "]!" not in line_of(said, "lora ", " done ") and "]! " in line_of(said, "lora ", "61/61")
    difference = compare_rows(new_run(tmp_path), rows["original"], rows["awq 4 bit"])
    assert difference["difference_finding"] == "identical" and difference["difference_pairs"] == 60
    page = (tmp_path / "search" / "report.html").read_text()
    assert told in page and "<td>no headline</td>" in page and "LLM judge: not used" in page


def test_a_judge_out_of_reach_ends_the_search_after_its_answer(factory, tmp_path, monkeypatch, capsys, hurried):  # noqa: F811
    mock = Mock(before=lambda *_: Failure("closed", "nobody listens")).install(monkeypatch)
    with pytest.raises(RuntimeError, match=r"does not answer .*nobody listens"):
        search.job(new_run(tmp_path, **OPTIONS))
    rows = read_rows(new_run(tmp_path))
    assert len(names(rows, "done")) == 4 and not any(row["is_llm_judge"] for row in rows)
    said = capsys.readouterr().out
    assert "LLM judge: FAILED, some answers have no judge score: The judge" in said and "not run" not in said
    assert "answer for no limit: awq 4 bit: 100.0" in said and "(baseline, no LLM judge)" in said
    page = (tmp_path / "search" / "report.html").read_text()
    assert "The LLM judge failed:</strong> The judge" in page and "nobody listens" in page and "not run" not in page
    mock.before, made = None, len(factory.made)
    search.job(new_run(tmp_path, **OPTIONS))
    assert len(factory.made) == made and {row["score_kind"] for row in read_rows(new_run(tmp_path))} == {"judge"}
