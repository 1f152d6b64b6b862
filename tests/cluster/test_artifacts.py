"""Artifacts: they appear whole or not at all, and a name stands for what made it."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import artifacts
from cluster.artifacts import ArtifactStore, Fingerprints, digest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def store(tmp_path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "artifacts")


def files(store: ArtifactStore) -> set[str]:
    return {str(path.relative_to(store.root)) for path in store.root.rglob("*") if path.is_file()}


def test_digest_is_of_the_value_not_of_its_spelling():
    # printf '{"a": [1, 2], "b": "\xc3\xa9"}' | sha256sum
    assert digest({"b": "é", "a": [1, 2]}) == digest({"a": [1, 2], "b": "é"}) == "36497487a71fa55a"
    assert digest({"a": [2, 1], "b": "é"}) != "36497487a71fa55a"


def test_digest_refuses_what_json_cannot_say():
    with pytest.raises(ValueError, match="not JSON compliant"):
        digest({"rate": float("nan")})


def test_an_artifact_appears_when_its_block_ends_and_not_before(store):
    with store.create("prune-1", {"layers": 2}) as (folder, facts):
        (folder / "weights").write_text("w")
        assert store.find("prune-1") is None and not (store.root / "prune-1").exists()
        facts["removed"] = [3]
    assert store.find("prune-1") == store.root / "prune-1"
    assert files(store) == {"prune-1/weights", "prune-1/manifest.json"}
    manifest = store.manifest("prune-1")
    assert manifest.pop("seconds") >= 0
    sums = {"weights": [1, hashlib.sha256(b"w").hexdigest()]}
    assert manifest == {"name": "prune-1", "recipe": {"layers": 2}, "removed": [3], "files": sums}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_block_that_raises_publishes_nothing_and_leaves_nothing(store, error):
    with pytest.raises(error), store.create("prune-1", {}) as (folder, _):
        (folder / "weights").write_text("half")
        raise error("no")
    assert store.find("prune-1") is None
    assert files(store) == set()


def test_a_resumable_stage_finds_what_it_left_and_another_does_not(store):
    with pytest.raises(RuntimeError), store.create("ablate-1", {}, resume=True) as (folder, _):
        (folder / "part-0").write_text("rows")
        raise RuntimeError("killed")
    assert store.find("ablate-1") is None
    with store.create("ablate-1", {}, resume=True) as (folder, _):
        assert (folder / "part-0").read_text() == "rows"
        (folder / "part-1").write_text("rows")
    assert files(store) == {"ablate-1/part-0", "ablate-1/part-1", "ablate-1/manifest.json"}


def test_what_a_killed_process_left_is_removed(store):
    script = (
        "import os, sys\nfrom cluster.artifacts import ArtifactStore\n"
        "with ArtifactStore(sys.argv[1]).create('prune-1', {}) as (folder, _):\n"
        "    (folder / 'half').write_text('x')\n    os._exit(9)\n"
    )
    assert run(script, store.root).returncode == 9
    assert len(files(store)) == 1
    with store.create("prune-1", {}) as (folder, _):
        assert list(folder.iterdir()) == []
    assert files(store) == {"prune-1/manifest.json"}


def test_of_two_processes_the_first_to_finish_is_kept_and_neither_disturbs_the_other(store):
    script = (
        "import sys\nfrom cluster.artifacts import ArtifactStore\n"
        "with ArtifactStore(sys.argv[1]).create('prune-1', {'by': 'other'}) as (folder, _):\n"
        "    assert list(folder.iterdir()) == [], 'sees the work of another process'\n"
        "    (folder / 'weights').write_text('other')\n"
    )
    with store.create("prune-1", {"by": "me"}) as (folder, _):
        (folder / "weights").write_text("me")
        other = run(script, store.root)
        assert other.returncode == 0, other.stderr
        assert (folder / "weights").read_text() == "me"
        (folder / "config").write_text("me")
    assert store.manifest("prune-1")["recipe"] == {"by": "other"}
    assert (store.root / "prune-1" / "weights").read_text() == "other"
    assert files(store) == {"prune-1/weights", "prune-1/manifest.json"}


def test_a_resumable_stage_that_another_process_published_meanwhile_keeps_theirs(store):
    with store.create("ablate-1", {"by": "me"}, resume=True) as (folder, _):
        (folder / "manifest.json").write_text(json.dumps({"recipe": {"by": "other"}}))
        os.rename(folder, store.root / "ablate-1")
    assert store.manifest("ablate-1")["recipe"] == {"by": "other"}


def run(script: str, root: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", script, str(root)], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )


def test_a_removed_artifact_is_gone_and_can_be_made_again(store):
    for content in ("first", "second"):
        with store.create("stage-1", {}) as (folder, _):
            (folder / "unit").write_text(content)
        assert (store.find("stage-1") / "unit").read_text() == content
        store.remove("stage-1")
        assert store.find("stage-1") is None and files(store) == set()
    store.remove("stage-1")


def test_a_name_that_is_taken_by_something_else_is_an_error(store):
    (store.root / "prune-1").mkdir(parents=True)
    (store.root / "prune-1" / "stray").write_text("no manifest here")
    with pytest.raises(OSError, match="not empty"), store.create("prune-1", {}):
        pass
    assert store.find("prune-1") is None


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """Count the files that are really read."""
    names: list[str] = []
    real = artifacts.file_sha256
    monkeypatch.setattr(artifacts, "file_sha256", lambda path: names.append(path.name) or real(path))
    return names


def test_fingerprints_read_a_file_once_and_again_when_it_changed(tmp_path, reads):
    file, cache = tmp_path / "model.bin", tmp_path / "cache" / "known.json"
    file.write_bytes(b"abc")
    known = Fingerprints(cache)
    first = known.file(file)
    known.save()
    assert first == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180's example
    assert Fingerprints(cache).file(file) == first  # a new process, so to speak
    assert reads == ["model.bin"]

    file.write_bytes(b"abd")  # the same size
    os.utime(file, ns=(0, 1))
    assert Fingerprints(cache).file(file) != first
    assert reads == ["model.bin"] * 2


def test_a_damaged_cache_is_no_worse_than_none(tmp_path, reads):
    file, cache = tmp_path / "model.bin", tmp_path / "known.json"
    file.write_bytes(b"abc")
    cache.write_text('{"half')
    known = Fingerprints(cache)
    assert known.file(file).startswith("ba7816bf")
    known.save()
    assert reads == ["model.bin"]
    assert len(json.loads(cache.read_text())) == 1


def test_a_folder_is_its_files_names_and_contents(tmp_path):
    def folder(name: str, **contents: str) -> str:
        (tmp_path / name).mkdir()
        for file, text in contents.items():
            (tmp_path / name / file).write_text(text)
        return Fingerprints(tmp_path / "known.json").folder(tmp_path / name)

    same = folder("one", config="c", weights="w")
    assert folder("two", weights="w", config="c") == same
    assert folder("renamed", config="c", weight="w") != same
    assert folder("changed", config="c", weights="W") != same


def test_leftovers_of_hosts_with_like_names_are_left_alone(tmp_path, monkeypatch):
    """Host gpu must neither stumble over nor remove what host gpu-1 is building."""
    monkeypatch.setattr(artifacts.socket, "gethostname", lambda: "gpu")
    foreign = tmp_path / "stage-1.gpu-1-77.partial"
    foreign.mkdir()
    with ArtifactStore(tmp_path).create("stage-1", {}) as (folder, _):
        (folder / "file").write_text("x")
    assert foreign.is_dir() and (tmp_path / "stage-1" / "file").read_text() == "x"


def test_the_seconds_of_a_stage_that_was_killed_are_those_of_all_its_legs(store, monkeypatch):
    """Ten seconds, a kill and an hour's rest, then five more; the kill came three seconds after the last file."""
    clock = [1000.0]
    monkeypatch.setattr(artifacts.time, "time", lambda: clock[0])
    with pytest.raises(KeyboardInterrupt), store.create("ablate-1", {}, resume=True) as (folder, _):
        (folder / "unit").touch()
        os.utime(folder / "unit", (1010.0, 1010.0))
        raise KeyboardInterrupt
    assert store.begun("ablate-1")
    clock[0] = 5000.0
    with store.create("ablate-1", {}, resume=True) as (folder, _):
        assert [path.name for path in folder.iterdir()] == ["unit"]
        clock[0] = 5005.0
    assert store.manifest("ablate-1")["seconds"] == 15 and not store.begun("ablate-1")
    assert files(store) == {"ablate-1/unit", "ablate-1/manifest.json"}


def test_a_resumed_stage_that_another_process_finishes_is_theirs(tmp_path):
    """Both build in one folder; the first renames it, and the second's next write finds no folder."""
    store = ArtifactStore(tmp_path)
    with store.create("stage-1", {}, resume=True) as (folder, _):
        with ArtifactStore(tmp_path).create("stage-1", {}, resume=True) as (same, _):
            (same / "unit").write_text("theirs")
        (folder / "unit").write_text("mine")
    assert (store.find("stage-1") / "unit").read_text() == "theirs"
