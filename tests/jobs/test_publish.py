"""Publishing: a verified checkpoint arrives complete, in a folder, a store or a hub repository; nothing else does."""

import json
from pathlib import Path

import huggingface_hub
import pytest
from httpx2 import ConnectError, Request, Response
from huggingface_hub.errors import HfHubHTTPError
from pyarrow import fs

from cluster.artifacts import MANIFEST
from jobs import prune, publish, verify
from jobs.reporting import card
from tests.jobs.here import run_here
from tests.jobs.spoiling import UP, spoil
from tests.tiny import DERM_TINY, plain_model

FILES = {
    *("README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors"),
    *("processor_config.json", "prunella.json", "tokenizer.json", "tokenizer_config.json"),
}


@pytest.fixture
def made(monkeypatch, tmp_path) -> Path:
    run = run_here(monkeypatch, tmp_path / "run", prune__order="[2, 5]")
    prune.job(run)
    return run.store.root / prune.stage(run, run.base_model()).name


@pytest.fixture
def send(monkeypatch, tmp_path, made):
    def job(to, model=made) -> None:
        publish.job(run_here(monkeypatch, tmp_path / "run", model, **({"publish__to": to} if to else {})))

    return job


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_into_a_folder(send, made, tmp_path, prefix, monkeypatch, capsys):
    """Real files, what others need and nothing else; it loads, passes the gate with its sums, and is a source again."""
    target = tmp_path / "models" / "mine"
    send(f"{prefix}{target}")
    assert {file.name for file in target.iterdir()} == FILES
    assert not any(file.is_symlink() for file in target.iterdir())
    assert [path.name for path in target.parent.iterdir()] == ["mine"]
    for name in FILES - {"prunella.json"}:
        assert (target / name).read_bytes() == (made / name).read_bytes()
    assert not [file for file in target.iterdir() if str(tmp_path).encode() in file.read_bytes()]
    assert plain_model(str(target)).config.text_config.num_hidden_layers == 8
    verify.job(run_here(monkeypatch, tmp_path / "run", target))
    assert "equal to the recorded ones" in capsys.readouterr().out
    run = run_here(monkeypatch, tmp_path / "run", target, prune__order="[2]", prune__layers=1)
    prune.job(run)
    again = run.store.root / prune.stage(run, run.base_model()).name
    assert not (again / card.RECORD).exists()
    assert [step.get("removed") for step in card.record(again)["history"]] == [None, [2, 5], [3]]
    send(str(tmp_path / "models" / "copy"), target)
    assert (tmp_path / "models" / "copy" / card.RECORD).read_bytes() == (target / card.RECORD).read_bytes()


def test_what_is_there_stays(send, tmp_path):
    """A folder with a file, or a file, is refused before any work; an empty folder is filled."""
    for target in (tmp_path / "full", tmp_path / "empty"):
        target.mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    for target in (tmp_path / "full", tmp_path / "full" / "x"):
        with pytest.raises(ValueError, match=r"publish\.to .* is not empty"):
            send(str(target))
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["x"]
    send(str(tmp_path / "empty"))
    assert {file.name for file in (tmp_path / "empty").iterdir()} == FILES


def test_an_interrupted_copy_leaves_nothing(send, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(publish.os, "rename", full)
    (tmp_path / "models").mkdir()
    with pytest.raises(ValueError, match=r"publish\.to .* cannot be written \(No space left on device\)"):
        send(str(tmp_path / "models" / "mine"))
    assert not list((tmp_path / "models").iterdir())


def test_a_changed_checkpoint_is_refused(send, made, tmp_path):
    spoil(made, UP, 0.5)
    with pytest.raises(RuntimeError, match=f"is refused: '{UP}' is not what was published"):
        send(str(tmp_path / "mine"))
    assert not (tmp_path / "mine").exists()


def test_what_prunella_did_not_make(send, tmp_path):
    with pytest.raises(ValueError, match="was not made by Prunella, or is an export"):
        send(str(tmp_path / "mine"), DERM_TINY)


def test_nowhere(send):
    with pytest.raises(ValueError, match=r"publish\.to is unset"):
        send(None)


def test_a_relative_folder(send, tmp_path, monkeypatch):
    """Below the working folder; in a submitted job, whose working folder Ray deletes, refused."""
    monkeypatch.chdir(tmp_path)
    send("mine")
    assert {file.name for file in (tmp_path / "mine").iterdir()} == FILES
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(ValueError, match=r"publish\.to 'other' is relative"):
        send("other")


def test_into_a_store(send, tmp_path, monkeypatch):
    """As into S3, with a folder as the bucket: the record is written last; a second time is refused."""
    (tmp_path / "bucket").mkdir()
    system, order = fs.SubTreeFileSystem(str(tmp_path / "bucket"), fs.LocalFileSystem()), []
    opened = fs.SubTreeFileSystem.open_output_stream

    class Noting(fs.SubTreeFileSystem):
        def open_output_stream(self, path, *arguments, **options):
            order.append(path)
            return opened(system, path, *arguments, **options)

    noting = Noting(str(tmp_path / "bucket"), fs.LocalFileSystem())

    class Found:
        @staticmethod
        def from_uri(uri):
            assert uri == "s3://bucket/models/mine"
            return noting, "models/mine"

    monkeypatch.setattr(publish.fs, "FileSystem", Found)
    send("s3://bucket/models/mine")
    target = tmp_path / "bucket" / "models" / "mine"
    assert {file.name for file in target.iterdir()} == FILES
    assert order[-1] == "models/mine/prunella.json" and len(order) == len(FILES)
    assert plain_model(str(target)).config.text_config.num_hidden_layers == 8
    with pytest.raises(ValueError, match="is not empty"):
        send("s3://bucket/models/mine")


def test_no_such_store(send):
    with pytest.raises(ValueError, match=r"'nowhere://x/y' cannot be used .*check the address"):
        send("nowhere://x/y")


class FakeHub:
    """What publishing asks of the hub's API, in memory."""

    def __init__(self):
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: list[bool] = []

    def repo_exists(self, repo_id):
        return repo_id in self.repositories

    def list_repo_files(self, repo_id):
        return list(self.repositories[repo_id])

    def create_repo(self, repo_id, private, exist_ok):
        self.private.append(private)
        self.repositories.setdefault(repo_id, {".gitattributes": b""})

    def upload_folder(self, repo_id, folder_path, commit_message):
        self.repositories[repo_id] |= {file.name: file.read_bytes() for file in Path(folder_path).iterdir()}


@pytest.fixture
def hub(monkeypatch):
    fake = FakeHub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_token")
    return fake


def test_into_a_hub_repository(send, made, hub):
    """Private, one commit, everything; a repository with files is refused, a new empty one is not."""
    send("hf://me/derm")
    assert set(hub.repositories["me/derm"]) == FILES | {".gitattributes"} and hub.private == [True]
    assert hub.repositories["me/derm"]["model.safetensors"] == (made / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="hf://me/derm is not empty"):
        send("hf://me/derm")
    hub.create_repo("me/new", True, True)
    send("hf://me/new")
    assert "config.json" in hub.repositories["me/new"]


def test_no_token_and_no_name(send, hub, monkeypatch):
    with pytest.raises(ValueError, match="hf://derm is not a repository: give hf://owner/name"):
        send("hf://derm")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ValueError, match="no token for the hub: set HF_TOKEN"):
        send("hf://me/derm")
    assert not hub.repositories


@pytest.mark.parametrize("step", ["repo_exists", "create_repo", "upload_folder"])
@pytest.mark.parametrize("kind", ["refuses", "silent"])
def test_a_hub_that_refuses_or_does_not_answer(hub, monkeypatch, tmp_path, step, kind):
    """One sentence with what it said, whichever request it is; its errors carry no errno."""

    def fail(*_, **__):
        if kind == "refuses":
            raise HfHubHTTPError("403 Forbidden: no write access", response=Response(403, request=Request("GET", "x")))
        raise ConnectError("[Errno -2] Name or service not known")

    monkeypatch.setattr(hub, step, fail)
    with pytest.raises(
        ValueError, match=r"publish\.to hf://me/derm cannot be used \(.*(403|not known).*check the name"
    ):
        place = publish.Hub("me/derm")
        place.check_empty()
        place.receive(tmp_path)


def test_the_record_tells_what_was_done_and_nothing_private(send, made, tmp_path):
    send(str(tmp_path / "mine"))
    record = json.loads((tmp_path / "mine" / card.RECORD).read_text())
    manifest = json.loads((made / MANIFEST).read_text())
    assert set(record) == {"history", "sums"} and record["sums"] == manifest["gate"]["sums"]
    assert [step["kind"] for step in record["history"]] == ["source", "prune"]
