"""Copy a checkpoint to where others find it: a folder, a storage URI, or a repository of the Hugging Face hub.

    python -m jobs.publish --config configs/derm-tiny.yaml --model.path runs/derm-tiny/artifacts/quantize-... \\
        --publish.to /models/mine
    ... --publish.to s3://bucket/mine       # or gs://, hdfs://: any that pyarrow reads, with the credentials it finds
    ... --publish.to hf://owner/name        # a private repository; needs a token (HF_TOKEN, or hf auth login)

Only checkpoints of jobs.prune, jobs.recover or jobs.quantize are published, if they pass jobs.verify again with
unchanged tensors. Weights, config, processor and model card are copied; prunella.json has the SHA-256 of every tensor.
Nothing is ever overwritten.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from cluster.artifacts import MANIFEST
from cluster.connection import in_submitted_job
from jobs import verify
from jobs.core.command import main
from jobs.core.run import Run
from jobs.reporting import card

HUB = "hf://"
COPIED_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt")


def job(run: Run) -> None:
    """Check the checkpoint `model.path` and copy it to `publish.to`."""
    target = run.config.publish.to
    if target is None:
        raise ValueError("publish.to is unset: give a folder, a storage URI, or hf://owner/name.")
    folder = verify.require_folder(run)
    if verify.recorded_sums(folder) is None or not (folder / card.CARD).is_file():
        raise ValueError(
            f"{str(folder)!r} was not made by Prunella, or is an export: publish a folder that jobs.prune, "
            "jobs.recover or jobs.quantize printed. Copy an export as it is."
        )
    place = _place(target)
    place.check_empty()
    sums = verify.verify_checkpoint(run, folder)["sums"]
    with tempfile.TemporaryDirectory() as text:
        staged = Path(text)
        stage(folder, staged, sums)
        place.receive(staged)
    print(f"publish: {folder} is at {target}", flush=True)


def stage(folder: Path, staged: Path, sums: dict[str, str]) -> None:
    """Fill `staged` with links to what others need of a checkpoint, and with its record."""
    for file in sorted(folder.iterdir()):
        if file.name == card.CARD or (file.suffix in COPIED_SUFFIXES and file.name not in (MANIFEST, card.RECORD)):
            (staged / file.name).symlink_to(file)
    record = {"history": card.record(folder)["history"], "sums": sums}
    (staged / card.RECORD).write_text(json.dumps(record, indent=1, ensure_ascii=False))


def _place(target: str) -> "Folder | Storage | Hub":
    if target.startswith(HUB):
        return Hub(target.removeprefix(HUB).strip("/"))
    if "://" in target and not target.startswith("file://"):
        return Storage(target)
    path = Path(target.removeprefix("file://")).expanduser()
    if not path.is_absolute() and in_submitted_job():
        raise ValueError(
            f"publish.to {target!r} is relative, but a submitted job runs in a temporary folder that Ray deletes: "
            "give an absolute path."
        )
    return Folder(path.resolve())


class Folder:
    """A folder of this machine, which appears complete or not at all."""

    def __init__(self, path: Path):
        self._path = path

    def check_empty(self) -> None:
        """ValueError: the path is a file, or a folder that is not empty."""
        if self._path.exists() and (not self._path.is_dir() or any(self._path.iterdir())):
            raise ValueError(f"publish.to {str(self._path)!r} is not empty: choose a folder that does not exist yet.")

    def receive(self, staged: Path) -> None:
        """Copy everything next to the folder, then rename. ValueError: it cannot be written."""
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(staged, temporary)
            temporary.chmod(0o755)
            os.rename(temporary, self._path)  # replaces an empty folder, and fails at any other
        except OSError as error:  # also shutil.Error, which has no strerror
            reason = error.strerror or error
            raise ValueError(f"publish.to {str(self._path)!r} cannot be written ({reason}): choose another.") from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


class Storage:
    """A folder of an object store; the record is written last, so that a copy without it is known to be incomplete."""

    def __init__(self, uri: str):
        self._uri = uri
        try:
            self._system, self._path = fs.FileSystem.from_uri(uri)
        except (pa.ArrowException, OSError) as error:
            raise self._explain_error(error) from None

    def _explain_error(self, error: Exception) -> ValueError:
        reason = " ".join(str(error).split())
        return ValueError(f"publish.to {self._uri!r} cannot be used ({reason}): check the address and the credentials.")

    def check_empty(self) -> None:
        """ValueError: something is there, or the store does not answer."""
        try:
            entries = self._system.get_file_info(fs.FileSelector(self._path, allow_not_found=True))
        except (pa.ArrowException, OSError) as error:
            raise self._explain_error(error) from None
        if entries:
            raise ValueError(f"publish.to {self._uri!r} is not empty ({entries[0].base_name}): choose another place.")

    def receive(self, staged: Path) -> None:
        """Copy file by file."""
        try:
            self._system.create_dir(self._path, recursive=True)
            for file in sorted(staged.iterdir(), key=lambda file: (file.name == card.RECORD, file.name)):
                with open(file, "rb") as source, self._system.open_output_stream(f"{self._path}/{file.name}") as out:
                    shutil.copyfileobj(source, out, 2**22)
        except (pa.ArrowException, OSError) as error:
            raise self._explain_error(error) from None


class Hub:
    """A model repository of the Hugging Face hub, made private if it does not exist."""

    def __init__(self, repository: str):
        from huggingface_hub import HfApi, get_token

        if repository.count("/") != 1:
            raise ValueError(f"publish.to {HUB}{repository} is not a repository: give hf://owner/name.")
        if get_token() is None:
            raise ValueError("There is no token for the hub: set HF_TOKEN, or log in with `hf auth login`.")
        self._repository, self._api = repository, HfApi()

    @contextmanager
    def _explain_hub_errors(self) -> Iterator[None]:
        """Raise ValueError if the hub refuses a request of the block, or does not answer."""
        from huggingface_hub.errors import HTTPError  # of the HTTP client, which differs between versions of the hub

        try:
            yield
        except (HTTPError, OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"publish.to {HUB}{self._repository} cannot be used ({reason}): check the name, the token's rights and "
                "the connection."
            ) from None

    def check_empty(self) -> None:
        """ValueError: the repository holds files, or the hub refuses."""
        with self._explain_hub_errors():
            exists = self._api.repo_exists(self._repository)
            files = self._api.list_repo_files(self._repository) if exists else []
        if others := [name for name in files if name != ".gitattributes"]:
            raise ValueError(f"publish.to {HUB}{self._repository} is not empty ({others[0]}): choose another name.")

    def receive(self, staged: Path) -> None:
        """Upload everything in one commit. ValueError: the hub refuses."""
        with self._explain_hub_errors():
            self._api.create_repo(self._repository, private=True, exist_ok=True)
            self._api.upload_folder(repo_id=self._repository, folder_path=staged, commit_message="Made by Prunella")


if __name__ == "__main__":
    main(__doc__, job)
