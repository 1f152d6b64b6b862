"""Content-addressed artifacts: folders named by the hash of what made them.

A stage whose artifact exists is not computed again; that one rule gives resume, sharing between settings
and reproducibility. An artifact appears under its name by one atomic rename when it is complete; until
then it is built in a folder `<name>...partial`: one of the process's own, or, if the stage can resume,
`<name>.partial`, which it finds again after a crash.
"""

import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

MANIFEST = "manifest.json"


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


class ArtifactStore:
    """The artifacts under one folder."""

    def __init__(self, root: Path):
        self.root = Path(root)

    def find(self, name: str) -> Path | None:
        """Return the folder of a complete artifact, or None."""
        folder = self.root / name
        return folder if (folder / MANIFEST).is_file() else None

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
        """Note that work on `partial` begins (again); return the seconds of earlier legs.

        A leg that was killed lasted, as far as can be known, until the last file that it wrote.
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
        """Return this process's building place for `name`, after removing those of dead processes of this host."""
        host = f"{name}.{socket.gethostname()}-"
        for left in self.root.glob(f"{host}*.partial"):
            number = left.name.removeprefix(host).removesuffix(".partial")
            if number.isdigit() and (int(number) == os.getpid() or not psutil.pid_exists(int(number))):
                shutil.rmtree(left, ignore_errors=True)
        return self.root / f"{host}{os.getpid()}.partial"

    def remove(self, name: str) -> None:
        """Delete an artifact, if it is there: it loses its name first, so that no half of it is ever found."""
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
            self._known = json.loads(cache.read_text())
        except (OSError, ValueError):
            self._known = {}

    def folder(self, folder: Path) -> str:
        """Return the digest of a checkpoint folder: the names and contents of all its files."""
        return digest({p.name: self.file(p) for p in sorted(folder.iterdir()) if p.is_file()})

    def file(self, path: Path) -> str:
        """Return a file's SHA-256; re-read only when its size or modification time changed."""
        status = path.stat()
        key = f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}"
        if key not in self._known:
            self._known[key] = file_sha256(path)
            self._unsaved = True
        return self._known[key]

    def save(self) -> None:
        """Write what was read since the last time."""
        if self._unsaved:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self._path, json.dumps(self._known))
            self._unsaved = False
