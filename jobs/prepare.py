"""Turn a folder of images into conversations: labelled, checked, grouped and split without leakage.

python -m jobs.prepare --config configs/derm-tiny.yaml
python -m jobs.prepare --config configs/llava-1.5-7b-dermnet.yaml --data.root /data/dermnet
"""

import csv
import logging
import os
import shutil
import string
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, TypedDict

import pyarrow as pa

from actors.dataset import (
    ClassPatterns,
    ImageFile,
    Skipped,
    class_shares,
    drop_contradictions,
    group_files,
    own_split,
    scan,
    split_groups,
)
from actors.derm_tiny import draw
from actors.maths.sampling import draw_places
from actors.maths.splits import FAR
from actors.specs import Conversation
from cluster.artifacts import digest
from jobs.config.schema import ClassConfig, DataConfig, QuestionConfig
from jobs.core.command import main
from jobs.core.conversation_rows import CONVERSATIONS, ConversationRow
from jobs.core.rows import Rows
from jobs.core.run import Run
from jobs.core.spreadsheet import canonical_columns, read_csv
from jobs.core.stage import Stage

LOG = logging.getLogger("jobs")
ANNOTATION_COLUMNS = ("path", "question_id", "answer")
QUESTION = "question"  # a fourth column, if there is one


class Annotation(NamedTuple):
    """A line of data.annotations; question: the text, empty where data.questions has it."""

    path: str
    question_id: str
    answer: str
    question: str


class SkippedRow(TypedDict):
    """A file or a question that was left out."""

    path: str
    reason: str


SKIPPED = Rows("skipped.parquet", SkippedRow, pa.schema([("path", pa.string()), ("reason", pa.string())]))


def stage(run: Run) -> Stage:
    """Return the data stage; it is named by the content of every file, so changed images are a new artifact."""
    data = run.config.data
    root = image_root(run)
    if data.draw_per_class and not root.is_dir():
        temporary = root.with_name(f"{root.name}.{os.getpid()}")
        temporary.mkdir(parents=True, exist_ok=True)
        count = draw.write_tree(temporary, data.draw_per_class, run.config.seed)
        try:
            temporary.rename(root)
        except OSError:  # another job was first
            shutil.rmtree(temporary)
        LOG.info(f"prepare: drew {count} images of derm-tiny into {root}")
    if not root.is_dir():
        raise ValueError(f"No image folder at data.root {str(root)!r}: give the folder that holds the class folders.")
    if not data.classes or not (data.questions or data.annotations):
        raise ValueError(
            "data.classes is empty, or data.questions and data.annotations both are: see configs/derm-tiny.yaml."
        )
    files = {
        path.relative_to(root).as_posix(): run.sources.fingerprints.file(path)
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }
    settings = data.model_dump(mode="json", exclude={"root", "draw_per_class"})
    recipe = {**settings, "seed": run.config.seed, "root": str(root), "files": files}
    return Stage("data", 3, {"sha256": digest(recipe)}, (), build)


def image_root(run: Run) -> Path:
    """Return the absolute folder of images."""
    data = run.config.data
    if data.root:
        return Path(data.root).expanduser().resolve()
    suffix = f"-{data.draw_per_class}-{run.config.seed}" if data.draw_per_class else ""
    return run.folder / f"images{suffix}"


def build(run: Run, folder: Path, facts: dict) -> None:
    """Scan, group, split, and write conversations and skipped files."""
    data, root = run.config.data, image_root(run)
    files, skipped = scan(root, [ClassPatterns(c.name, tuple(_patterns(c))) for c in data.classes])
    tables = {data.annotations, *(draw.ANNOTATIONS if data.draw_per_class else ())}
    skipped = [s for s in skipped if s.path not in tables]
    files, contradictions = drop_contradictions(files)
    skipped += contradictions
    groups = group_files(files, data.near_duplicate_bits, data.group_pattern)
    if data.splits:
        splits, leaks = own_split(files, groups, data.splits)
        skipped += leaks
    else:
        splits = [*split_groups(files, groups, data.test_fraction, run.config.seed)]
    rows, unanswered = _conversations(data, root, files, groups, splits)
    skipped += unanswered
    CONVERSATIONS.write(folder, rows)
    SKIPPED.write(folder, [{"path": each.path, "reason": each.reason} for each in skipped])
    images = Counter((row["split"], row["image"]) for row in rows)
    facts["images"] = {side: sum(split == side for split, _ in images) for side in ("train", "test")}
    facts["shares"] = class_shares(files, groups, splits)
    facts["conversations"] = len(rows)
    facts["skipped"] = len(skipped)
    LOG.info(
        f"prepare: {facts['images']['train']} training and {facts['images']['test']} test images, "
        f"{len(rows)} conversations, {len(skipped)} files skipped"
    )
    _report_shares(facts["shares"], None if data.splits else data.test_fraction)
    for reason, count in Counter(s.kind for s in skipped).most_common(5):
        LOG.warning(f"prepare: skipped {count}: {reason}")


def _report_shares(shares: Mapping[str, Mapping[str, int]], wanted: float | None) -> None:
    """Log each class's share in the test split; warn if it is far from `wanted` (None: the splits were given)."""
    for label, counts in shares.items():
        share = counts["test_images"] / counts["images"] if counts["images"] else 0.0
        words = (
            f"prepare: class {label}: {counts['test_images']} of {counts['images']} images ({100 * share:.1f} %) and "
            f"{counts['test_groups']} of {counts['groups']} groups are test data"
        )
        if wanted is not None and abs(share - wanted) > FAR:
            LOG.warning(f"{words}; data.test_fraction is {100 * wanted:.1f} %, which whole groups cannot reach")
        else:
            LOG.info(words)


def _patterns(kind: ClassConfig) -> list[str]:
    return kind.match or [f"{kind.name}/*", f"*/{kind.name}/*"]


def _conversations(
    data: DataConfig, root: Path, files: list[ImageFile], groups: list[int], splits: list[str | None]
) -> tuple[list[ConversationRow], list[Skipped]]:
    annotations = _annotations(data, root)
    classes = {kind.name: kind for kind in data.classes}
    rows: list[ConversationRow] = []
    skipped: list[Skipped] = []
    for file, group, split in zip(files, groups, splits, strict=True):
        if split is None:
            continue
        given = annotations.get(file.path, {})
        asked = [(q.id, q.text, _reference(q, classes[file.label], given.pop(q.id, None))) for q in data.questions]
        asked += [(each.question_id, each.question, each.answer) for each in given.values() if each.question]
        for question_id, text, reference in asked:
            if reference is None:
                skipped.append(Skipped(file.path, f"no annotation for the question {question_id!r}"))
                continue
            rows.append(
                {
                    "sample_id": f"{file.path}#{question_id}",
                    "image": str(root / file.path),
                    "sha256": file.sha256,
                    "class": file.label,
                    "question_id": question_id,
                    "question": text,
                    "reference": reference,
                    "split": split,
                    "group": group,
                }
            )
    if not rows:
        raise ValueError("No image has an answer to any question: check data.questions and data.annotations.")
    return rows, skipped


def _annotations(data: DataConfig, root: Path) -> dict[str, dict[str, Annotation]]:
    """Return the annotations by path and question_id."""
    if data.annotations is None:
        return {}
    path = root / data.annotations
    try:
        rows = read_csv(path)
    except OSError as error:
        raise ValueError(f"Cannot read data.annotations {str(path)!r}: {error.strerror}.") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"data.annotations {str(path)!r} is not a CSV file ({error}).") from None
    columns = canonical_columns(rows[0] if rows else (), (*ANNOTATION_COLUMNS, QUESTION), str(path))
    lacking = [name for name in ANNOTATION_COLUMNS if name not in columns.values()]
    if lacking:
        raise ValueError(
            f"data.annotations {str(path)!r} needs the columns {', '.join(ANNOTATION_COLUMNS)}; it lacks "
            f"{', '.join(lacking)}."
        )
    table = [{columns[key]: value or "" for key, value in row.items() if key in columns} for row in rows]
    by_path: dict[str, dict[str, Annotation]] = {}
    for row in table:
        each = Annotation(row["path"], row["question_id"], row["answer"], row.get(QUESTION, ""))
        by_path.setdefault(each.path, {})[each.question_id] = each
    return by_path


def _reference(question: QuestionConfig, kind: ClassConfig, annotation: Annotation | None) -> str | None:
    if annotation is not None:
        return annotation.answer
    if question.answer is None:
        return None
    texts = {"name": kind.name, **kind.texts}
    lacking = {key for _, key, _, _ in string.Formatter().parse(question.answer) if key} - set(texts)
    if lacking:
        raise ValueError(
            f"Class {kind.name!r} lacks texts.{min(lacking)}, which the answer to question {question.id!r} needs."
        )
    return question.answer.format(**texts)


def conversations(folder: str, split: str) -> list[ConversationRow]:
    """Read one split of a data artifact."""
    return [row for row in CONVERSATIONS.read(folder) if row["split"] == split]


def training_conversations(folder: str) -> list[Conversation]:
    """Read the training split of a data artifact, as workers take it."""
    return [
        Conversation(row["sample_id"], row["image"], row["question"], row["reference"])
        for row in conversations(folder, "train")
    ]


def draw_conversations(folder: str, count: int, seed: int) -> list[Conversation]:
    """Return `count` training conversations (all, if there are fewer) in a random order, the same for a seed."""
    rows = training_conversations(folder)
    return [rows[place] for place in draw_places(len(rows), count, seed)]


def job(run: Run) -> None:
    """Make the data artifact."""
    folder = run.make(stage(run))
    print(f"prepare: conversations are in {folder}/{CONVERSATIONS}", flush=True)


if __name__ == "__main__":
    main(__doc__, job)
