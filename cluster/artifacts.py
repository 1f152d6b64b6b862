"""Content-addressed artifacts: folders named by the hash of what made them.

A stage whose artifact exists is not computed again; that one rule gives resume, sharing between settings
and reproducibility. An artifact appears under its name by one atomic rename when it is complete; until
then it is built in a folder `<name>...partial`: one of the process's own, or, if the stage can resume,
`<name>.partial`, which it finds again after a crash.
"""

import hashlib
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import psutil

from cluster.text import one_line

LOG = logging.getLogger("cluster")
MANIFEST = "manifest.json"
SUMS = "files"  # of the manifest
NOT_SUMMED = (MANIFEST, "README.md")  # a model card gets its scores later


def digest(value) -> str:
    """Return 16 hex digits of the SHA-256 of a JSON value, independent of the order of keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically: a reader, or a crash, sees the old one or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_sums(folder: Path) -> dict[str, list]:
    """Return [bytes, SHA-256] of every file of an artifact by its path in it, but for those that may change."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in NOT_SUMMED)
    return {path.relative_to(folder).as_posix(): [path.stat().st_size, file_sha256(path)] for path in files}


def find_damage(folder: Path, whole: bool) -> str | None:
    """Return the first damaged file of an artifact, and how it is damaged; None: there is none.

    whole: compare the files' SHA-256, else only their sizes. Artifacts of older code have no sums, and pass.
    """
    try:
        sums = json.loads((folder / MANIFEST).read_text()).get(SUMS, {})
    except (OSError, ValueError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({one_line(error)})"
    for name, (size, sha256) in sums.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
        if whole and file_sha256(file) != sha256:
            return f"{name} has another SHA-256 than when it was made"
    return None


class ArtifactStore:
    """The artifacts under one folder. A damaged artifact is removed, so that it is made again."""

    _whole: ClassVar[set[Path]] = set()  # artifacts whose sums this process has compared

    def __init__(self, root: Path):
        self.root = Path(root)

    def find(self, name: str) -> Path | None:
        """Return the folder of a complete artifact whose files have the right sizes, or None."""
        return self._whole_or_none(name, whole=False)

    def verify(self, name: str) -> Path | None:
        """Return the folder of a complete artifact whose files have the right sums (once a process), or None."""
        folder = self.root / name
        if folder in self._whole and self.find(name):
            return folder
        if self._whole_or_none(name, whole=True) is None:
            return None
        self._whole.add(folder)
        return folder

    def _whole_or_none(self, name: str, whole: bool) -> Path | None:
        folder = self.root / name
        if not (folder / MANIFEST).is_file():
            return None
        if (damage := find_damage(folder, whole)) is None:
            return folder
        LOG.warning(f"{name} is damaged, and is made again where it is needed: {damage}")
        self.remove(name)
        return None

    @contextmanager
    def create(self, name: str, recipe: dict, resume: bool = False) -> Iterator[tuple[Path, dict]]:
        """Yield (folder to fill, facts to note); on a clean exit the artifact is published under `name`.

        With `resume` the folder still holds what an interrupted run left there; otherwise it is empty.
        `recipe` and the facts are written to manifest.json. A block that raises publishes nothing.
        """
        partial = self.root / f"{name}.partial" if resume else self._own_partial(name)
        partial.mkdir(parents=True, exist_ok=True)
        facts: dict = {}
        started, before = time.time(), self._earlier_legs(name, partial) if resume else 0.0
        try:
            yield partial, facts
        except BaseException as error:
            if resume and isinstance(error, OSError) and self.find(name) is not None:
                return  # another process resumed the same work, finished first and took the folder: keep theirs
            if not resume:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        manifest = {"name": name, "recipe": recipe, "seconds": round(before + time.time() - started, 3), **facts}
        manifest[SUMS] = file_sums(partial)
        self._whole.add(self.root / name)
        try:
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False))
            os.rename(partial, self.root / name)
            self._legs(name).unlink(missing_ok=True)
        except OSError:
            if self.find(name) is None:  # another process published the same artifact first: keep theirs
                raise
            shutil.rmtree(partial, ignore_errors=True)

    def begun(self, name: str) -> bool:
        """Tell whether an artifact that can resume was begun, and is not complete."""
        return self._legs(name).is_file()

    def _earlier_legs(self, name: str, partial: Path) -> float:
        """Note that work on `partial` begins (again); return the seconds of earlier legs, the runs before this one.

        A leg that was killed counts until it last wrote a file.
        """
        notes = self._legs(name)
        legs = json.loads(notes.read_text()) if notes.is_file() else []
        if legs:
            written = max((path.stat().st_mtime for path in partial.rglob("*")), default=0.0)
            legs[-1][1] = max(legs[-1][0], written)
        write_text(notes, json.dumps([*legs, [time.time(), 0.0]]))
        return sum(end - start for start, end in legs)

    def _legs(self, name: str) -> Path:
        return self.root / f".{name}.legs"

    def _own_partial(self, name: str) -> Path:
        """Return this process's partial folder for `name`, after removing those of this host's dead processes."""
        host = f"{name}.{socket.gethostname()}-"
        for leftover in self.root.glob(f"{host}*.partial"):
            number = leftover.name.removeprefix(host).removesuffix(".partial")
            if number.isdigit() and (int(number) == os.getpid() or not psutil.pid_exists(int(number))):
                shutil.rmtree(leftover, ignore_errors=True)
        return self.root / f"{host}{os.getpid()}.partial"

    def remove(self, name: str) -> None:
        """Delete an artifact, if it exists; it is renamed first, so that nobody finds a part of it."""
        doomed = self._own_partial(name)
        try:
            os.rename(self.root / name, doomed)
        except FileNotFoundError:
            return
        shutil.rmtree(doomed)

    def manifest(self, name: str) -> dict:
        """Return the manifest of a complete artifact."""
        return json.loads((self.root / name / MANIFEST).read_text())


class Fingerprints:
    """SHA-256 of files, remembered by (path, size, modification time) so that weights are read once."""

    def __init__(self, cache: Path):
        self._path, self._unsaved = cache, False
        try:
            self._sums = json.loads(cache.read_text())
        except (OSError, ValueError):
            self._sums = {}

    def folder(self, folder: Path) -> str:
        """Return the digest of a checkpoint folder: the names and contents of all its files."""
        return digest({p.name: self.file(p) for p in sorted(folder.iterdir()) if p.is_file()})

    def file(self, path: Path) -> str:
        """Return a file's SHA-256; re-read only when its size or modification time changed."""
        status = path.stat()
        key = f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}"
        if key not in self._sums:
            self._sums[key] = file_sha256(path)
            self._unsaved = True
        return self._sums[key]

    def save(self) -> None:
        """Write the cache if it has new sums."""
        if self._unsaved:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self._path, json.dumps(self._sums))
            self._unsaved = False
