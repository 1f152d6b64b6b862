"""From folders as collections really are to conversations."""

import csv

import numpy as np
import pytest
from PIL import Image

from cluster.tables import read_table
from jobs import prepare
from jobs.core.facts import PrepareFacts
from jobs.core.options import load_config
from jobs.core.run import Run


def picture(path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)


@pytest.fixture
def collection(tmp_path):
    """Folders named by more than one disease, with punctuation, and a split of their own."""
    root = tmp_path / "collection"
    seed = 0
    for side, count in (("train", 4), ("test", 2)):
        for number in range(count):
            for name in ("acne-1", "rosacea", "Rosacea Nose"):
                seed += 1
                picture(root / side / "Acne and Rosacea Photos" / f"{name}-{number}.jpg", seed)
            for name in ("psoriasis", "lichen-planus"):
                seed += 1
                picture(root / side / "Psoriasis pictures, Lichen Planus (etc.)" / f"{name}-{number}.jpg", seed)
    return root


def config(tmp_path, root, **data):
    classes = [
        {"name": "rosacea", "match": ["*Rosacea Photos/rosacea*"], "texts": {"care": "Use sun cream."}},
        {"name": "psoriasis", "match": ["*/psoriasis-*"], "texts": {"care": "Use ointment."}},
    ]
    questions = [
        {"id": "name", "text": "Which disease?", "answer": "This is {name}."},
        {"id": "care", "text": "Care?", "answer": "{care}"},
    ]
    values = {"root": str(root), "classes": classes, "questions": questions, **data}
    return load_config(None, [("run_dir", str(tmp_path / "run")), ("data", str(values))])


def made(settings) -> tuple[list[dict], dict[str, str]]:
    with Run(settings) as run:
        folder = run.store.root / prepare.stage(run).name
        run.make(prepare.stage(run))
    rows = read_table(folder / prepare.CONVERSATIONS)
    return rows, {row["path"]: row["reason"] for row in read_table(folder / prepare.SKIPPED)}


def test_a_collections_own_split_and_mixed_folders(tmp_path, collection):
    splits = {"train": ["train/*"], "test": ["test/*"]}
    rows, skipped = made(config(tmp_path, collection, splits=splits))
    assert {row["class"] for row in rows} == {"rosacea", "psoriasis"}
    assert sum(row["split"] == "test" for row in rows) == 2 * (2 + 2 + 2)
    assert all((row["split"] == "train") == ("/train/" in row["image"]) for row in rows)
    assert skipped["train/Acne and Rosacea Photos/acne-1-0.jpg"] == "no class matches"
    row = next(row for row in rows if row["class"] == "rosacea" and row["question_id"] == "care")
    assert (row["question"], row["reference"]) == ("Care?", "Use sun cream.")
    assert set(row) == {
        *("sample_id", "image", "sha256", "class", "question_id", "question", "reference", "split", "group")
    }


def test_a_copy_of_a_test_image_leaves_the_training_split(tmp_path, collection):
    copy = collection / "train" / "Acne and Rosacea Photos" / "rosacea-copy.jpg"
    copy.write_bytes((collection / "test" / "Acne and Rosacea Photos" / "rosacea-0.jpg").read_bytes())
    rows, skipped = made(config(tmp_path, collection, splits={"train": ["train/*"], "test": ["test/*"]}))
    assert skipped["train/Acne and Rosacea Photos/rosacea-copy.jpg"] == "near-duplicate of a test image"
    assert not any("rosacea-copy" in row["image"] for row in rows)


def test_without_a_split_groups_stay_together(tmp_path, collection):
    source = collection / "train" / "Acne and Rosacea Photos" / "rosacea-0.jpg"
    for number in range(5):
        (source.parent / f"rosacea-again-{number}.jpg").write_bytes(source.read_bytes())
    rows, _ = made(config(tmp_path, collection, test_fraction=0.3))
    sides = {row["image"]: row["split"] for row in rows}
    copies = {side for image, side in sides.items() if "rosacea-again" in image or image == str(source)}
    assert len(copies) == 1
    for kind in ("rosacea", "psoriasis"):
        assert {row["split"] for row in rows if row["class"] == kind} == {"train", "test"}


def test_the_shares_of_the_test_split_are_said(tmp_path, collection, capsys):
    """By class, in images and groups; one that whole groups cannot reach is a warning; the facts have the numbers."""
    settings = config(tmp_path, collection, test_fraction=0.25)
    made(settings)
    said = capsys.readouterr().err
    assert "class rosacea: 3 of 12 images (25.0 %) and 3 of 12 groups are test data" in said
    assert "WARNING prepare: class psoriasis: 2 of 6 images (33.3 %)" in said and "data.test_fraction is 25.0 %" in said
    with Run(settings) as run:
        shares = run.facts(prepare.stage(run), PrepareFacts)["shares"]
    assert shares["psoriasis"] == {"images": 6, "test_images": 2, "groups": 6, "test_groups": 2}


def test_the_same_image_in_two_classes_is_a_contradiction(tmp_path, collection):
    source = collection / "train" / "Acne and Rosacea Photos" / "rosacea-0.jpg"
    other = collection / "train" / "Psoriasis pictures, Lichen Planus (etc.)" / "psoriasis-wrong.jpg"
    other.write_bytes(source.read_bytes())
    _, skipped = made(config(tmp_path, collection))
    reasons = [reason for path, reason in skipped.items() if "psoriasis-wrong" in path or "rosacea-0" in path]
    assert any("psoriasis, rosacea" in reason for reason in reasons)


def test_annotations_may_ask_questions_of_their_own(tmp_path, collection):
    """Of these lines one answers a question of the config, two ask their own, one has no question, one no image."""
    path = "train/Acne and Rosacea Photos/rosacea-0.jpg"
    with open(collection / "notes.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", "question_id", "Question", "answer"])
        table.writerows([path, *line] for line in (["name", "Ignored?", "Rosacea."], ["q1", "Is it red?", "yes"]))
        table.writerows([path, *line] for line in (["q2", "Is it blue?", "no"], ["q3", "", "nobody asks"]))
        table.writerow(["elsewhere.jpg", "q1", "Is it red?", "no"])
    questions = [{"id": "name", "text": "Which disease?", "answer": "This is {name}."}]
    splits = {"train": ["train/*"], "test": ["test/*"]}
    rows, _ = made(config(tmp_path, collection, annotations="notes.csv", questions=questions, splits=splits))
    own = [row for row in rows if row["sample_id"].startswith(f"{path}#")]
    assert [(row["question_id"], row["question"], row["reference"]) for row in own] == [
        ("name", "Which disease?", "Rosacea."),
        ("q1", "Is it red?", "yes"),
        ("q2", "Is it blue?", "no"),
    ]
    assert {row["question_id"] for row in rows if row not in own} == {"name"}
    rows, _ = made(config(tmp_path, collection, annotations="notes.csv", questions=[], splits=splits))
    assert [row["question"] for row in rows] == ["Ignored?", "Is it red?", "Is it blue?"]


def test_annotations_give_answers_and_gaps_are_listed(tmp_path, collection):
    image = "train/Acne and Rosacea Photos/rosacea-0.jpg"
    with open(collection / "notes.csv", "w", newline="") as file:
        csv.writer(file).writerows([("path", "question_id", "answer"), (image, "site", "On the nose.")])
    questions = [{"id": "site", "text": "Where?"}]
    rows, skipped = made(config(tmp_path, collection, annotations="notes.csv", questions=questions))
    assert [(row["reference"], row["sample_id"]) for row in rows] == [("On the nose.", f"{image}#site")]
    assert skipped["train/Acne and Rosacea Photos/rosacea-1.jpg"] == "no annotation for the question 'site'"


def test_a_missing_text_is_named(tmp_path, collection):
    questions = [{"id": "cause", "text": "Cause?", "answer": "{cause}"}]
    with pytest.raises(ValueError, match=r"'rosacea' lacks texts\.cause.*'cause'"):
        made(config(tmp_path, collection, questions=questions))


def test_changed_images_are_a_new_artifact(tmp_path, collection):
    settings = config(tmp_path, collection)
    with Run(settings) as run:
        before = prepare.stage(run).name
        assert prepare.stage(run).name == before
        picture(collection / "train" / "Acne and Rosacea Photos" / "rosacea-0.jpg", 999)
        assert prepare.stage(run).name != before
