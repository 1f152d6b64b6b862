"""The answers in the report: some side by side, and all of them for the viewer, with each image's thumbnail once."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

THUMBNAIL = 112  # pixels of the longer side
THUMBNAIL_BYTES = 6 * 2**20  # of all thumbnails together
SAMPLES_SHOWN = 6
LONGEST_TEXT = 4000  # characters of an answer that the page shows
Answers = Mapping[str, Mapping[str, Mapping]]  # method -> sample_id -> row


def samples(by_method: Answers) -> list[dict]:
    """Pick answers side by side (paper, figure 5): first where the methods disagree most, one image each."""
    shared = set.intersection(*(set(rows) for rows in by_method.values()))
    ranked = sorted(shared, key=lambda s: (-len({rows[s]["answer"] for rows in by_method.values()}), s))
    original = next(iter(by_method.values()))
    picked, images = [], set()
    for sample in ranked:
        row = original[sample]
        if row["image"] in images:
            continue
        images.add(row["image"])
        answers: dict[str, list[str]] = {}  # the methods that gave the same answer stand together
        for method, rows in by_method.items():
            answers.setdefault(rows[sample]["answer"], []).append(method)
        score = {rows[sample]["answer"]: rows[sample]["baseline"] for rows in by_method.values()}
        grouped = [(", ".join(methods), shorten(answer), score[answer]) for answer, methods in answers.items()]
        picked.append({**row, "thumbnail": thumbnail(row["image"]), "answers": grouped})
        if len(picked) == SAMPLES_SHOWN:
            break
    return picked


def viewer(by_method: Answers, verdicts: Mapping[str, Sequence[Mapping]]) -> dict:
    """Return what the viewer needs of every question that a model answered; verdicts: the judge's rows by method."""
    labels = {method: {row["sample_id"]: row for row in rows} for method, rows in verdicts.items()}
    row_of: dict[str, Mapping] = {}
    for rows in by_method.values():
        row_of = {**rows, **row_of}
    ordered = sorted(row_of.values(), key=lambda row: (row["class"], row["image"]))
    images = list(dict.fromkeys((row["image"], row["class"]) for row in ordered))
    questions = list(dict.fromkeys((row["question_id"], row["question"]) for row in ordered))
    thumbnails = encode_thumbnails([path for path, _ in images], THUMBNAIL_BYTES)
    image_number = {path: number for number, (path, _) in enumerate(images)}
    question_number = {question: number for number, question in enumerate(questions)}
    return {
        "methods": list(by_method),
        "judged": bool(verdicts),
        "classes": sorted({label for _, label in images}),
        "questions": [{"id": key, "text": text} for key, text in questions],
        "images": [
            {"name": Path(path).name, "label": label, "thumbnail": small}
            for (path, label), small in zip(images, thumbnails, strict=True)
        ],
        "without_thumbnail": thumbnails.count(None),
        "rows": [
            {
                "image": image_number[row["image"]],
                "question": question_number[row["question_id"], row["question"]],
                "reference": shorten(row["reference"]),
                "answers": [
                    _answer(rows.get(row["sample_id"]), labels.get(method, {}).get(row["sample_id"]))
                    for method, rows in by_method.items()
                ],
            }
            for row in ordered
        ],
    }


def _answer(row: Mapping | None, verdict: Mapping | None) -> dict | None:
    if row is None:
        return None
    return {
        "answer": shorten(row["answer"]),
        "baseline": round(row["baseline"], 4),
        "verdict": row["verdict"],
        "named": row["named"],
        "loop": row["loop_tokens"] > 0,
        "stopped": row["stopped"],
        "label": verdict["judge_label"] if verdict else None,
        "reason": shorten(verdict["judge_reason"]) if verdict else None,
    }


def shorten(text: str) -> str:
    """Cut a text that is too long for the page, and say so."""
    if len(text) <= LONGEST_TEXT:
        return text
    return f"{text[:LONGEST_TEXT]} ... (cut: {len(text):,} characters in all)"


def encode_thumbnails(paths: Sequence[str], most: int) -> list[str | None]:
    """Return the images' thumbnails as data URIs; None: not readable, or more than `most` bytes together."""
    thumbnails, size = [], 0
    for path in paths:
        small = thumbnail(path)
        size += len(small or "")
        thumbnails.append(small if size <= most else None)
    return thumbnails


def thumbnail(path: str) -> str | None:
    """Return a small JPEG of an image as a data URI, None if it is not readable any more: the answers still stand."""
    try:
        with Image.open(path) as image:
            small = image.convert("RGB")
            small.thumbnail((THUMBNAIL, THUMBNAIL))
    except OSError:
        return None
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
