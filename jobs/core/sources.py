"""Finding checkpoints that exist already: a folder is named by its content, a hub id by its commit."""

import json
import re
from pathlib import Path

from cluster.artifacts import MANIFEST, Fingerprints, digest, find_damage, write_text
from jobs.core.stage import Source


class Sources:
    """The checkpoints that a run was given. Files are read once, and the hub is asked once.

    seen: the file that lists those that were inspected before, and are complete.
    """

    def __init__(self, fingerprints: Fingerprints, seen: Path):
        self.fingerprints, self._seen = fingerprints, seen
        self._commits: dict[tuple[str, str | None], str] = {}

    def find(self, path: str, field: str, revision: str | None = None) -> Source:
        """Return the checkpoint at a folder or hub id; ValueError names `field`: there is none."""
        folder = Path(path).expanduser()
        if folder.is_dir():
            if name := _artifact_name(folder):
                if damage := find_damage(folder, whole=True):
                    raise ValueError(f"{field} {path!r} is damaged: {damage}. Make it again, or copy it again.")
                return Source(name, str(folder.resolve()))
            if not (folder / "config.json").is_file():
                raise ValueError(f"{field} {path!r} is a folder without config.json: not a checkpoint.")
            return Source(f"model-{self.fingerprints.folder(folder)}", str(folder.resolve()))
        if folder.is_absolute() or path.startswith((".", "~")) or path.count("/") != 1:
            raise ValueError(f"No checkpoint at {field} {path!r}: give a folder or a hub id (owner/name).")
        if (path, revision) not in self._commits:
            self._commits[path, revision] = hub_commit(path, revision)
        commit = self._commits[path, revision]
        return Source(f"model-{digest([path, commit])}", path, commit)

    def was_seen(self, source: Source) -> bool:
        """Tell whether a checkpoint of this content was inspected before."""
        return source.name in self._read_seen()

    def note_seen(self, source: Source) -> None:
        """Remember that a checkpoint was inspected."""
        self._seen.parent.mkdir(parents=True, exist_ok=True)
        write_text(self._seen, json.dumps(sorted({*self._read_seen(), source.name})))

    def _read_seen(self) -> list[str]:
        try:
            return json.loads(self._seen.read_text())
        except (OSError, ValueError):
            return []


def _artifact_name(folder: Path) -> str | None:
    """Return the name of an artifact of ours, None if the folder is somebody else's."""
    try:
        return str(json.loads((folder / MANIFEST).read_text())["name"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def hub_commit(repository: str, revision: str | None) -> str:
    """Return the commit (40 hex digits) of a hub repository at a revision; ValueError: neither hub nor cache has it."""
    import httpx2
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if revision and re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    try:
        return str(HfApi().model_info(repository, revision=revision).sha)
    except (HfHubHTTPError, httpx2.HTTPError, OSError, RuntimeError) as error:
        reason = type(error).__name__
    try:  # a node without network may have it in its cache, in a folder named by the commit
        return Path(snapshot_download(repository, revision=revision, local_files_only=True)).name
    except (LocalEntryNotFoundError, OSError):
        raise ValueError(
            f"model.path {repository!r} is not a local folder, the hub did not answer for it ({reason}), and it is not "
            "in the hub's cache: check the spelling and the network, or give a local folder."
        ) from None
