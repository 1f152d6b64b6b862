"""Turns a folder of images into labelled, grouped and split files. Uses only Pillow and numpy.

Near-duplicates (the same bytes, a close perceptual hash, one file-name series) form a group, and a group never
crosses the split. Unusable files are skipped, and listed with the reason.
"""

import fnmatch
import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from actors.images import open_image
from actors.maths.splits import choose_groups

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"}
HASH_SIDE = 8
LARGE_GROUP = 4  # images; a group of this size or more must not be most of its class


@dataclass(frozen=True)
class ClassPatterns:
    """A class and the patterns (* and ?; case does not matter) of the relative paths that belong to it."""

    name: str
    patterns: tuple[str, ...]


@dataclass(frozen=True)
class ImageFile:
    """A readable image: path below the root, class, SHA-256 of its bytes, 64-bit difference hash."""

    path: str
    label: str
    sha256: str
    dhash: int


@dataclass(frozen=True)
class Skipped:
    """A file that is not used, and why."""

    path: str
    reason: str

    @property
    def kind(self) -> str:
        """The reason without the path: files with the same fault share it."""
        return self.reason.replace(f"{self.path!r} ", "").replace(self.path, "...")


def scan(root: Path, classes: Sequence[ClassPatterns]) -> tuple[list[ImageFile], list[Skipped]]:
    """Read every file below `root`; return the usable images, sorted by path, and the skipped files.

    ValueError: no such folder, or a class without a single readable image.
    """
    if not root.is_dir():
        raise ValueError(f"No image folder at data.root {str(root)!r}: give the folder that holds the class folders.")
    paths = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_symlink() or not p.is_dir())
    with ThreadPoolExecutor() as pool:
        results = list(pool.map(lambda path: _inspect(root, path, classes), paths))
    files = [r for r in results if isinstance(r, ImageFile)]
    skipped = [r for r in results if isinstance(r, Skipped)]
    for kind in classes:
        if not any(file.label == kind.name for file in files):
            raise ValueError(
                f"Class {kind.name!r} has no readable image below {str(root)!r} "
                f"(patterns: {', '.join(kind.patterns)}): correct its `match` in data.classes, or remove the class."
            )
    return files, skipped


def _inspect(root: Path, path: str, classes: Sequence[ClassPatterns]) -> ImageFile | Skipped:
    if Path(path).name.startswith("."):
        return Skipped(path, "hidden file")
    if not (root / path).is_file():
        return Skipped(path, "link to a folder, which is not followed" if (root / path).is_dir() else "broken link")
    if Path(path).suffix.lower() not in SUFFIXES:
        return Skipped(path, "not an image type")
    labels = [kind.name for kind in classes if any(_matches(path, pattern) for pattern in kind.patterns)]
    if len(labels) != 1:
        return Skipped(path, f"matches several classes: {', '.join(labels)}" if labels else "no class matches")
    try:
        data = (root / path).read_bytes()
        if not data:
            return Skipped(path, "empty file")
        dhash = difference_hash(open_image(str(root / path)))
    except (ValueError, OSError) as error:
        return Skipped(path, str(error).replace(str(root / path), path))
    return ImageFile(path, labels[0], hashlib.sha256(data).hexdigest(), dhash)


def _matches(path: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(path.lower(), pattern.lower())


def difference_hash(image: Image.Image) -> int:
    """Return 64 bits: whether each pixel of a 9 x 8 grey thumbnail is brighter than its right neighbour."""
    grey = np.asarray(image.convert("L").resize((HASH_SIDE + 1, HASH_SIDE), Image.Resampling.BOX), dtype=np.int16)
    bits = (grey[:, 1:] < grey[:, :-1]).flatten()
    return int("".join("1" if bit else "0" for bit in bits), 2)


def group_files(files: Sequence[ImageFile], bits: int, series_pattern: str | None) -> list[int]:
    """Return each file's group number: files share one if a chain of near-duplicates joins them.

    bits: largest Hamming distance of difference hashes; -1: hashes are not compared. series_pattern: a regular
    expression whose first group, in the folder and file name, names a series; ValueError if it is not valid.
    """
    parent = list(range(len(files)))

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    def join_equal(keys) -> None:
        first: dict = {}
        for i, key in enumerate(keys):
            if key is not None:
                parent[find(i)] = find(first.setdefault(key, i))

    join_equal(file.sha256 for file in files)
    if series_pattern:
        try:
            series = re.compile(series_pattern)
        except re.error as error:
            raise ValueError(f"data.group_pattern {series_pattern!r} is not a regular expression: {error}.") from None
        if series.groups < 1:
            raise ValueError(f"data.group_pattern {series_pattern!r} has no group: mark the series with (...).")
        matches = [series.search(file.path) for file in files]
        join_equal((file.label, m.group(1)) if m else None for file, m in zip(files, matches, strict=True))
    if bits >= 0:
        hashes = np.array([file.dhash for file in files], dtype=np.uint64)
        for i in range(len(files) - 1):
            for j in np.nonzero(np.bitwise_count(hashes[i + 1 :] ^ hashes[i]) <= bits)[0]:
                parent[find(i + 1 + int(j))] = find(i)
    return [find(i) for i in range(len(files))]


def drop_contradictions(files: Sequence[ImageFile]) -> tuple[list[ImageFile], list[Skipped]]:
    """Return the other files, and the images whose bytes occur in several classes: at least one label is wrong."""
    labels = defaultdict(set)
    for file in files:
        labels[file.sha256].add(file.label)
    good = [file for file in files if len(labels[file.sha256]) == 1]
    bad = [
        Skipped(file.path, f"the same image is in several classes: {', '.join(sorted(labels[file.sha256]))}")
        for file in files
        if len(labels[file.sha256]) > 1
    ]
    return good, bad


def split_groups(files: Sequence[ImageFile], groups: Sequence[int], test_fraction: float, seed: int) -> list[str]:
    """Return "train" or "test" per file: whole groups, each class as near to `test_fraction` as its groups allow.

    Grouped and stratified (actors.maths.splits.choose_groups). A group with images of several classes goes to the test
    split if no class then exceeds its share. ValueError: a class has fewer than two groups of its own, or one group
    holds most of its images.
    """
    random = np.random.default_rng(seed)
    counts: dict[int, Counter[str]] = defaultdict(Counter)
    for file, group in zip(files, groups, strict=True):
        counts[group][file.label] += 1
    totals = Counter(file.label for file in files)
    wanted = {label: max(1, round(test_fraction * total)) for label, total in sorted(totals.items())}
    test: set[int] = set()
    mixed = [group for group, labels in sorted(counts.items()) if len(labels) > 1]
    for group in (mixed[i] for i in random.permutation(len(mixed))):
        if all(count <= wanted[label] for label, count in counts[group].items()):
            test.add(group)
            wanted = {label: number - counts[group][label] for label, number in wanted.items()}
    for label, number in wanted.items():
        own_groups = [group for group, labels in sorted(counts.items()) if set(labels) == {label}]
        sides = {group in test for group in mixed if label in counts[group]}
        if len(own_groups) + len(sides) < 2:
            raise ValueError(
                f"Class {label!r} has fewer than two near-duplicate groups of its own: train and test need one each. "
                "Add images, or lower data.near_duplicate_bits."
            )
        _refuse_large_group(label, totals[label], max(counts, key=lambda group: counts[group][label]), files, groups)
        if len(own_groups) == 1 and sides == {False}:
            test.update(own_groups)
        elif len(own_groups) > 1 and number > 0:
            sizes = [counts[group][label] for group in own_groups]
            test.update(own_groups[place] for place in choose_groups(sizes, number, random))
    return ["test" if group in test else "train" for group in groups]


def _refuse_large_group(label: str, total: int, group: int, files: Sequence[ImageFile], groups: Sequence[int]) -> None:
    """Raise ValueError if one group holds most of a class; groups below LARGE_GROUP images pass."""
    members = [file.path for file, number in zip(files, groups, strict=True) if number == group and file.label == label]
    if len(members) >= LARGE_GROUP and 2 * len(members) > total:
        raise ValueError(
            f"Class {label!r} cannot be split: {len(members)} of its {total} images are one group, near-duplicates or "
            f"one series (the first is {members[0]!r}). Remove copies; if they show different cases, change "
            "data.group_pattern or lower data.near_duplicate_bits; or give a split of your own (data.splits)."
        )


def class_shares(
    files: Sequence[ImageFile], groups: Sequence[int], splits: Sequence[str | None]
) -> dict[str, dict[str, int]]:
    """Return, by class, the numbers of images and groups in use, and how many of them are in the test split."""
    shares = {}
    for label in sorted({file.label for file in files}):
        used = [(g, s) for file, g, s in zip(files, groups, splits, strict=True) if file.label == label and s]
        test = [g for g, s in used if s == "test"]
        shares[label] = {
            "images": len(used),
            "test_images": len(test),
            "groups": len({g for g, _ in used}),
            "test_groups": len(set(test)),
        }
    return shares


def own_split(
    files: Sequence[ImageFile], groups: Sequence[int], patterns: dict[str, list[str]]
) -> tuple[list[str | None], list[Skipped]]:
    """Return the collection's own split per file (None: not used), and the skipped files.

    A training image in the same group as a test image would leak: it is skipped, and the test split stays as it is.
    ValueError: the patterns do not name exactly train and test, or one of them has no image.
    """
    if set(patterns) != {"train", "test"}:
        raise ValueError(f"data.splits names {sorted(patterns)}: it must name patterns for train and for test.")
    splits: list[str | None] = []
    for file in files:
        sides = [side for side in ("train", "test") if any(_matches(file.path, p) for p in patterns[side])]
        splits.append(sides[0] if len(sides) == 1 else None)
    skipped = [Skipped(f.path, "in neither split, or in both") for f, s in zip(files, splits, strict=True) if s is None]
    test_groups = {group for group, side in zip(groups, splits, strict=True) if side == "test"}
    for i, (file, group) in enumerate(zip(files, groups, strict=True)):
        if splits[i] == "train" and group in test_groups:
            splits[i] = None
            skipped.append(Skipped(file.path, "near-duplicate of a test image"))
    for side in ("train", "test"):
        if side not in splits:
            raise ValueError(f"No image is in the {side} split (data.splits.{side}: {patterns[side]}).")
    return splits, skipped
