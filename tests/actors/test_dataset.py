"""From folders to splits: what is skipped and why, which files form a group, and that no group crosses a split."""

import re
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from actors.dataset import (
    ClassPatterns,
    ImageFile,
    Skipped,
    class_shares,
    difference_hash,
    drop_contradictions,
    group_files,
    own_split,
    scan,
    split_groups,
)
from actors.derm_tiny.draw import write_tree
from actors.derm_tiny.world import CLASSES
from actors.maths.splits import FAR

AB = (ClassPatterns("a", ("A/*",)), ClassPatterns("b", ("B/*",)))
SERIES = r"([^/]+-\d+)-[a-z]\.png$"


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8))


def file(path: str, label: str = "a", sha: str | None = None, dhash: int = 0) -> ImageFile:
    return ImageFile(path, label, sha or path, dhash)


def list_groups(groups: list[int]) -> list[list[int]]:
    """Return the groups as lists of indices."""
    return sorted([i for i, group in enumerate(groups) if group == wanted] for wanted in set(groups))


@pytest.fixture
def folders(tmp_path):
    for seed, place in enumerate(("A/1.png", "A/2.PNG", "B/1.png")):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        noise(seed).save(tmp_path / place)
    return tmp_path


def test_scan_of_a_messy_tree(folders):
    """Every unusable file is listed with its reason; upper-case suffixes and folders count."""
    (folders / "C").mkdir()
    noise(9).save(folders / "C" / "x.png")
    (folders / "A" / "notes.txt").write_text("x")
    (folders / "A" / "empty.jpg").write_bytes(b"")
    (folders / "A" / "page.jpg").write_text("<html>")
    (folders / "A" / ".hidden.png").write_bytes(b"")
    (folders / "A" / "loop").symlink_to(folders)
    (folders / "A" / "lost.png").symlink_to(folders / "nowhere.png")
    files, skipped = scan(folders, AB)
    assert [(f.path, f.label) for f in files] == [("A/1.png", "a"), ("A/2.PNG", "a"), ("B/1.png", "b")]
    reasons = {item.path: item.reason for item in skipped}
    hidden = "A/.hidden.png"
    assert sorted(reasons) == [hidden, "A/empty.jpg", "A/loop", "A/lost.png", "A/notes.txt", "A/page.jpg", "C/x.png"]
    assert reasons[hidden] == "hidden file" and reasons["A/lost.png"] == "broken link"
    assert reasons["A/loop"] == "link to a folder, which is not followed"
    assert reasons["A/empty.jpg"] == "empty file" and reasons["A/notes.txt"] == "not an image type"
    assert reasons["C/x.png"] == "no class matches"
    assert "'A/page.jpg' is not a readable image" in reasons["A/page.jpg"]
    assert str(folders) not in reasons["A/page.jpg"].split("(")[0]
    assert Skipped("A/1.jpg", "'A/1.jpg' is not a readable image (x: 'A/1.jpg')").kind == (
        Skipped("B/2.jpg", "'B/2.jpg' is not a readable image (x: 'B/2.jpg')").kind
    )


def test_patterns_ignore_case_and_may_overlap(folders):
    """a/* finds folder A; a file that two classes claim belongs to neither, and the reason names both."""
    classes = (ClassPatterns("a", ("a/*",)), ClassPatterns("b", ("b/*", "a/2.png")))
    files, skipped = scan(folders, classes)
    assert [f.path for f in files] == ["A/1.png", "B/1.png"]
    assert [(item.path, item.reason) for item in skipped] == [("A/2.PNG", "matches several classes: a, b")]


def test_class_without_images(folders):
    """The class, its patterns and the remedy are in the message."""
    with pytest.raises(ValueError, match=r"Class 'c' has no readable image .*patterns: C/\*.*data\.classes"):
        scan(folders, (*AB, ClassPatterns("c", ("C/*",))))


def test_no_folder(tmp_path):
    """A root that does not exist."""
    with pytest.raises(ValueError, match=r"No image folder at data\.root"):
        scan(tmp_path / "nowhere", AB)


def test_identity_of_files(folders):
    """The SHA-256 is of the bytes; a renamed copy has the same one."""
    import hashlib

    shutil.copy(folders / "A" / "1.png", folders / "A" / "3.png")
    files = {f.path: f for f in scan(folders, AB)[0]}
    assert files["A/1.png"].sha256 == hashlib.sha256((folders / "A" / "1.png").read_bytes()).hexdigest()
    assert files["A/1.png"].sha256 == files["A/3.png"].sha256 != files["A/2.PNG"].sha256


def test_difference_hash_by_hand():
    """Grey falls from left to right in the upper half (32 ones), rises in the lower half (32 zeros)."""
    ramp = np.tile(np.linspace(250, 10, 9).astype(np.uint8), (4, 1))
    image = Image.fromarray(np.concatenate([ramp, ramp[:, ::-1]]))
    assert difference_hash(image) == 0xFFFFFFFF00000000
    assert difference_hash(image.resize((90, 80), Image.Resampling.NEAREST)) == 0xFFFFFFFF00000000


def test_groups_by_bytes_hash_and_series():
    """0 = 1 by bytes; 1 ~ 2 by two bits of the hash; 3 = 4 by series; 5 alone: three groups."""
    files = [
        file("A/x-1-a.png", sha="same", dhash=0),
        file("A/y-1-a.png", sha="same", dhash=0b1100 << 40),
        file("A/z-1-a.png", dhash=0b1111 << 40),
        file("A/s-7-a.png", dhash=0xFFFF),
        file("A/s-7-b.png", dhash=0xFFFF0000),
        file("A/t-7-b.png", dhash=0xFFFF00000000),
    ]
    assert list_groups(group_files(files, 2, SERIES)) == [[0, 1, 2], [3, 4], [5]]
    assert list_groups(group_files(files, 1, SERIES)) == [[0, 1], [2], [3, 4], [5]]
    assert list_groups(group_files(files, -1, None)) == [[0, 1], [2], [3], [4], [5]]


def test_chains_join_far_ends():
    """Hashes 0, 11, 1111, 111111 (binary): neighbours differ by two bits, the ends by six; one chain, one group."""
    files = [file(str(i), dhash=(1 << 2 * i) - 1) for i in (3, 0, 2, 1)]
    assert list_groups(group_files(files, 2, None)) == [[0, 1, 2, 3]]
    assert list_groups(group_files([files[0], files[1], files[3]], 2, None)) == [[0], [1, 2]]


def test_series_of_two_classes_are_two():
    """The same number in two class folders is not one series."""
    files = [file("A/img-1-a.png", "a", dhash=0), file("B/img-1-b.png", "b", dhash=0xFF)]
    assert list_groups(group_files(files, -1, SERIES)) == [[0], [1]]


@pytest.mark.parametrize(
    ("pattern", "words"), [("(", "not a regular expression"), (r"\d+", r"no group: mark .* \(\.\.\.\)")]
)
def test_bad_group_patterns(pattern, words):
    """The setting, its value and the remedy."""
    with pytest.raises(ValueError, match=rf"data\.group_pattern {re.escape(repr(pattern))} .*{words}"):
        group_files([file("A/1.png")], 0, pattern)


def test_drawn_tree_groups_its_series(tmp_path):
    """write_tree photographs every eighth lesion twice: 9 lesions per class are 11 files in 9 series."""
    write_tree(tmp_path, per_class=9, seed=3)
    classes = [ClassPatterns(kind.name, (f"{kind.folder}/*",)) for kind in CLASSES]
    files, skipped = scan(tmp_path, classes)
    assert len(files) == 8 * 11 and [item.path for item in skipped] == ["annotations.csv", "sentences.csv"]
    groups = group_files(files, -1, SERIES)
    pairs = [[files[i].path for i in group] for group in list_groups(groups) if len(group) > 1]
    assert len(set(groups)) == 8 * 9 and len(pairs) == 16
    assert all(a.removesuffix("-a.png") == b.removesuffix("-b.png") for a, b in map(sorted, pairs))


def test_contradictions():
    """The same bytes in two classes: both are taken out, with both names; a copy within a class stays."""
    files = [file("A/1", "a", "x"), file("B/1", "b", "x"), file("A/2", "a", "y"), file("A/3", "a", "y")]
    good, bad = drop_contradictions(files)
    assert [f.path for f in good] == ["A/2", "A/3"]
    assert [(item.path, item.reason) for item in bad] == [
        (path, "the same image is in several classes: a, b") for path in ("A/1", "B/1")
    ]


def many(groups_per_class: int, size: int) -> tuple[list[ImageFile], list[int]]:
    files = [
        file(f"{label}/{group}-{i}", label) for label in "ab" for group in range(groups_per_class) for i in range(size)
    ]
    return files, [i // size for i in range(len(files))]


@pytest.mark.parametrize("seed", range(5))
def test_split_is_grouped_and_stratified(seed):
    """2 classes x 10 groups x 3 images at 20 %: 6 test images of each class, whole groups, whatever the seed."""
    files, groups = many(10, 3)
    sides = split_groups(files, groups, 0.2, seed)
    for group in set(groups):
        assert len({side for side, own in zip(sides, groups, strict=True) if own == group}) == 1
    for label in "ab":
        own = [side for side, f in zip(sides, files, strict=True) if f.label == label]
        assert own.count("test") == 6 and own.count("train") == 24
    assert sides == split_groups(files, groups, 0.2, seed)


def test_seed_changes_the_split():
    """Different seeds choose different groups."""
    files, groups = many(10, 3)
    assert len({tuple(split_groups(files, groups, 0.2, seed)) for seed in range(5)}) > 2


def test_each_side_has_every_class():
    """Two groups of a class: one is tested, one is trained on, at the smallest and the largest fraction."""
    files, groups = many(2, 1)
    for fraction in (0.01, 0.99):
        sides = split_groups(files, groups, fraction, 0)
        assert sorted(sides[:2]) == sorted(sides[2:]) == ["test", "train"]


@pytest.mark.parametrize(("groups", "label"), [([0, 0, 1, 2], "a"), ([0, 1, 0, 0], "b")])
def test_class_without_two_groups(groups, label):
    """It cannot be split, also if its images are all in groups with another class: class and setting are named."""
    files = [file("1", "a"), file("2", "a"), file("3", "b"), file("4", "b")]
    words = rf"Class '{label}' has fewer than two near-duplicate groups of its own.*data\.near_duplicate_bits"
    with pytest.raises(ValueError, match=words):
        split_groups(files, groups, 0.5, 0)


def lesions(*sizes: int, label: str = "a", first: int = 0) -> tuple[list[ImageFile], list[int]]:
    """Groups of these sizes, one series each."""
    groups = [first + number for number, size in enumerate(sizes) for _ in range(size)]
    return [file(f"{label}/{i}-{group}.png", label) for i, group in enumerate(groups)], groups


@pytest.mark.parametrize("seed", range(20))
def test_a_long_series_does_not_fill_the_test_split(seed):
    """20 lesions and one that was photographed 12 times: 3 of 32 images, whatever the seed; another class beside it."""
    (files, groups), (others, more) = lesions(*[1] * 20, 12), lesions(*[1] * 30, label="b", first=100)
    shares = class_shares(files + others, groups + more, split_groups(files + others, groups + more, 0.1, seed))
    assert shares["a"] == {"images": 32, "test_images": 3, "groups": 21, "test_groups": 3}
    assert shares["b"] == {"images": 30, "test_images": 3, "groups": 30, "test_groups": 3}


def test_a_group_that_is_most_of_a_class_is_refused():
    """Its size, its class, a file of it, and what to do about it; a pair among three images is no reason."""
    files, groups = lesions(1, 200, *[1] * 19)
    words = r"Class 'a' cannot be split: 200 of its 220 images are one group.*'a/1-1\.png'.*data\.group_pattern.*splits"
    with pytest.raises(ValueError, match=words):
        split_groups(files, groups, 0.1, 0)
    assert split_groups(*lesions(2, 1), 0.1, 0) == ["train", "train", "test"]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 9), min_size=3, max_size=9), min_size=1, max_size=3),
    st.floats(0.05, 0.6),
    st.integers(0, 5),
)
def test_splits_of_random_groups(sizes, fraction, seed):
    """No group crosses, each side has every class, and no class is further off than its smallest groups make it."""
    files, groups = [], []
    for number, own in enumerate(sizes):
        more = lesions(*own, label="abc"[number], first=100 * number)
        files, groups = files + more[0], groups + more[1]
        if 2 * max(own) > sum(own):
            return
    splits = split_groups(files, groups, fraction, seed)
    assert splits == split_groups(files, groups, fraction, seed)
    assert all(len({s for s, g in zip(splits, groups, strict=True) if g == group}) == 1 for group in set(groups))
    for number, own in enumerate(sizes):
        counts = class_shares(files, groups, splits)["abc"[number]]
        wanted = max(1, round(fraction * sum(own)))
        assert 0 < counts["test_groups"] < counts["groups"] == len(own) and counts["images"] == sum(own)
        assert counts["test_images"] <= max(wanted, min(own)) + FAR * sum(own)
        assert counts["test_images"] > wanted - max(own)


def test_a_group_of_two_classes_goes_where_it_fits():
    """One image of each class of ten: to the test split at 20 %; three of each would be too many."""
    files = [file(f"a/{i}", "a") for i in range(10)] + [file(f"b/{i}", "b") for i in range(10)]
    groups = [0, *range(1, 10), 0, *range(11, 20)]
    assert split_groups(files, groups, 0.2, 0)[0] == "test"
    groups = [0, 0, 0, *range(3, 10), 0, 0, 0, *range(13, 20)]
    splits = split_groups(files, groups, 0.2, 0)
    assert splits[0] == "train" and splits[:10].count("test") == splits[10:].count("test") == 2


def test_own_split_takes_leaks_out_of_training():
    """A training image in one group with a test image leaves; the test image stays; a stray file is listed."""
    files = [file("train/1"), file("train/2"), file("test/1"), file("other/1")]
    sides, skipped = own_split(files, [0, 1, 1, 3], {"train": ["train/*"], "test": ["test/*"]})
    assert sides == ["train", None, "test", None]
    assert {item.path: item.reason for item in skipped} == {
        "train/2": "near-duplicate of a test image",
        "other/1": "in neither split, or in both",
    }


def test_own_split_errors():
    """Splits that are not train and test, or one without images."""
    with pytest.raises(ValueError, match=r"names \['train', 'val'\]: it must name patterns for train and for test"):
        own_split([file("a")], [0], {"train": ["*"], "val": ["*"]})
    with pytest.raises(ValueError, match=r"No image is in the test split \(data\.splits\.test: \['test/\*'\]\)"):
        own_split([file("train/1")], [0], {"train": ["train/*"], "test": ["test/*"]})
