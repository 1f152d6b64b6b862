"""A job's run: its config, its artifacts, its workers; and the stages that make artifacts from artifacts."""

import json
import math
import re
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from cluster.artifacts import MANIFEST, ArtifactStore, Fingerprints, digest
from cluster.connection import in_submitted_job

if TYPE_CHECKING:
    from cluster.pool import Pool

from jobs.config.schema import Config


@dataclass(frozen=True)
class Stage:
    """One artifact to make: what it is made from, with which settings, by which version of the code.

    `build(run, folder, facts)` fills `folder` and notes `facts` in its manifest. Two stages of one name are the
    same artifact.
    """

    kind: str
    version: int
    settings: dict
    parents: tuple["Stage | Source", ...]
    build: Callable[["Run", Path, dict], None] = field(compare=False)
    resume: bool = False

    @property
    def recipe(self) -> dict:
        """Everything that decides the artifact's content."""
        parents = [parent.name for parent in self.parents]
        return {"kind": self.kind, "version": self.version, "settings": self.settings, "parents": parents}

    @property
    def name(self) -> str:
        """The artifact's folder name."""
        return f"{self.kind}-{digest(self.recipe)}"


@dataclass(frozen=True)
class Source:
    """A checkpoint that exists already: a folder, or a hub id at a commit."""

    name: str
    path: str
    revision: str | None = None


class Run:
    """What the stages of one job share. Ray starts when the first worker is needed, and not before.

    home: a run whose connection, embedders and fingerprints this one borrows while others run beside it; a worker then
    has replicas.cpus cores in place of a whole node's. command: what started the job, for model cards.
    """

    def __init__(
        self, config: Config, home: "Run | None" = None, command: str | None = None, beside_others: bool = False
    ):
        self.config = config
        self.beside_others = beside_others  # their replicas share the machines with those of this run
        self.home = home
        self.command: str | None = command or (home.command if home else None)
        self.folder = checked_run_dir(config.run_dir)
        self.store = ArtifactStore(self.folder / "artifacts")
        cache = self.folder / "artifacts" / "fingerprints.json"
        self.fingerprints: Fingerprints = home.fingerprints if home else Fingerprints(cache)
        self._cleanup = ExitStack()
        self._connected = False
        self._seen: set[str] = set()
        self._commits: dict[tuple[str, str | None], str] = home._commits if home else {}
        self._embedders: dict[str, Pool] = {}
        self._pools: list[Pool] = []  # of the stage that is being made

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *exception) -> None:
        self._cleanup.close()
        if exception[0] is None:
            self.fingerprints.save()

    def record_config(self, job: str) -> None:
        """Write the resolved config into the run folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        (self.folder / f"config.{job}.yaml").write_text(text)

    def make(self, stage: "Stage | Source") -> str:
        """Return the stage's folder (a source's path), computing what does not exist yet."""
        if isinstance(stage, Source):
            return stage.path
        found = self.store.find(stage.name)
        if found is None:
            for parent in stage.parents:
                self.make(parent)
            print(f"{stage.kind}: computing {stage.name}", flush=True)
            self._pools.clear()
            goes_on = stage.resume and self.store.begun(stage.name)
            with self.store.create(stage.name, stage.recipe, stage.resume) as (folder, facts):
                stage.build(self, folder, facts)
                if not goes_on:  # what killed legs held is not known
                    facts["gpu_seconds"] = round(sum(pool.gpu_seconds for pool in self._pools), 3)
            found = self.store.find(stage.name)
        elif stage.name not in self._seen:
            print(f"{stage.kind}: {stage.name} exists, reused", flush=True)
        self._seen.add(stage.name)
        return str(found)

    def missing(self, stages: Iterable["Stage | Source"]) -> list[Stage]:
        """Return the stages that would have to be computed."""
        return [s for s in stages if isinstance(s, Stage) and self.store.find(s.name) is None]

    def facts(self, stage: Stage) -> dict:
        """Return the manifest of a stage that exists."""
        return self.store.manifest(stage.name)

    def base_model(self) -> Source:
        """Return the model of the config, named by its content."""
        return self.source(self.config.model.path, "model.path", self.config.model.revision)

    def source(self, path: str, field: str, revision: str | None = None) -> Source:
        """Return a folder, named by its content, or a hub id at a commit; ValueError, with the field: no checkpoint."""
        folder = Path(path).expanduser()
        if folder.is_dir():
            manifest = folder / MANIFEST
            if manifest.is_file():
                return Source(json.loads(manifest.read_text())["name"], str(folder.resolve()))
            if not (folder / "config.json").is_file():
                raise ValueError(f"{field} {path!r} is a folder without config.json: not a checkpoint.")
            return Source(f"model-{self.fingerprints.folder(folder)}", str(folder.resolve()))
        if folder.is_absolute() or path.startswith((".", "~")) or path.count("/") != 1:
            raise ValueError(f"No checkpoint at {field} {path!r}: give a folder or a hub id (owner/name).")
        if (path, revision) not in self._commits:  # the hub is asked once
            self._commits[path, revision] = _hub_commit(path, revision)
        commit = self._commits[path, revision]
        return Source(f"model-{digest([path, commit])}", path, commit)

    def resolved(self) -> Config:
        """Return the config for other processes of this run: with its whole run_dir and the base model's commit."""
        model = self.config.model
        if (commit := self.base_model().revision) is not None:
            model = model.model_copy(update={"revision": commit})
        return self.config.model_copy(update={"run_dir": str(self.folder), "model": model})

    def base_config(self):
        """Return the config.json of the config's model, as transformers reads it; no weights are loaded."""
        from transformers import AutoConfig

        base, trusted = self.base_model(), self.config.model.trust_remote_code
        return AutoConfig.from_pretrained(base.path, revision=base.revision, trust_remote_code=trusted)

    def model_spec(self, stage: "Stage | Source", gpus: float = 1, sharers: int = 1):
        """Return how a worker with `gpus` GPUs loads the checkpoint of a stage; sharers: of its machine's memory."""
        from actors.specs import ModelSpec

        model = self.config.model
        revision = stage.revision if isinstance(stage, Source) else None
        return ModelSpec(self.make(stage), model.dtype, revision, model.trust_remote_code, gpus, sharers)

    def replicas(self, stage: "Stage | Source", target: str = "actors.engine.replica:LlavaReplica", **kwargs) -> "Pool":
        """Return a pool of workers that hold the model of a stage, spread over what the cluster has."""
        from cluster.connection import capacity, is_private, room
        from cluster.pool import Pool, Resources

        self._connect()
        wanted = self.config.replicas
        fit = room(wanted.cpus, wanted.gpus)
        if fit < 1 and (wanted.count == "auto" or is_private()):
            raise ValueError(_TOO_SMALL.format(wanted.cpus, wanted.gpus, *capacity()))
        if wanted.count != "auto" and wanted.count > fit:
            print(
                f"replicas: {wanted.count} wanted, room for {fit} now; the others start when there is room", flush=True
            )
        spec = self.model_spec(stage, wanted.gpus, 1 if wanted.gpus else self._sharers())
        kwargs |= {"spec": spec, "max_rows": wanted.max_rows}
        self._pools.append(Pool(target, kwargs, Resources(wanted.cpus, wanted.gpus, wanted.count)))
        return self._pools[-1]

    def _sharers(self) -> int:
        """Return how many replicas without a GPU one machine may hold now; those of runs beside this one count, too."""
        from cluster.connection import room_on_one

        wanted = self.config.replicas
        fit = room_on_one(wanted.cpus, 0)
        if wanted.count == "auto" or (self.beside_others and fit):
            return fit
        return min(wanted.count, fit or wanted.count)

    def worker(self, target: str, count: int = 1, **kwargs) -> "Pool":
        """Return workers with one GPU each; without GPUs one has all cores of one node, several have replicas.cpus."""
        from cluster.connection import capacity, is_private, largest_node
        from cluster.pool import Pool, Resources

        self._connect()
        wanted = self.config.replicas
        shares = self.home is not None or wanted.gpus or count > 1
        cpus = wanted.cpus if shares else max(wanted.cpus, largest_node())
        there = capacity()
        if cpus > there[0] or (wanted.gpus and there[1] < 1):
            if is_private():
                raise ValueError(_TOO_SMALL.format(cpus, min(1, wanted.gpus), *there))
            print(f"{target}: waiting for a node with {cpus:g} cores{' and a GPU' if wanted.gpus else ''}", flush=True)
        self._pools.append(Pool(target, kwargs, Resources(cpus, 1 if wanted.gpus else 0, count)))
        return self._pools[-1]

    def worker_count(self) -> int:
        """Return how many workers with one GPU each the replicas' GPUs make; without GPUs replicas.count, 1 if auto."""
        from cluster.connection import is_private, room

        wanted = self.config.replicas
        if self.home is not None or (wanted.count == "auto" and not wanted.gpus):
            return 1
        self._connect()
        fit = max(1, room(wanted.cpus, 1 if wanted.gpus else 0))
        if wanted.count == "auto":
            return fit
        count = math.ceil(wanted.count * (wanted.gpus or 1))
        return min(count, fit) if is_private() else count

    def embedder_identity(self, name: str) -> str:
        """Return what names a sentence-transformer in a recipe: its content where it is here, else its hub id."""
        from actors.embedder import embedder_path

        folder = Path(embedder_path(name))
        if not folder.is_dir():
            return name
        return f"{name}@{digest([self.fingerprints.file(p) for p in sorted(folder.rglob('*')) if p.is_file()])}"

    def embedder(self, name: str) -> "Pool":
        """Return the worker that holds a sentence-transformer; it lives as long as the run."""
        from cluster.pool import Pool, Resources

        if self.home is not None:
            return self.home.embedder(name)
        self._connect()
        if name not in self._embedders:
            pool = Pool("actors.embedder:Embedder", {"name": name}, Resources(cpus=0))
            self._embedders[name] = self._cleanup.enter_context(pool)
        return self._embedders[name]

    def _connect(self) -> None:
        if self.home is not None:
            self.home._connect()
        elif not self._connected:
            from cluster.connection import connected

            self._cleanup.enter_context(connected())
            self._connected = True


_TOO_SMALL = (
    "A worker needs {:g} cores and {:g} GPUs on one node; there are {:g} and {:g} in all: lower replicas.cpus / "
    "replicas.gpus, add nodes, or, on a cluster that grows by itself, say how many replicas you want (replicas.count)."
)


def checked_run_dir(text: str) -> Path:
    """Return the run folder; ValueError if it is a URI, or relative inside a submitted job."""
    if "://" in text:
        raise ValueError(f"run_dir {text!r} is a URI: give a folder that all nodes see, e.g. a network mount.")
    path = Path(text).expanduser()
    if not path.is_absolute() and in_submitted_job():
        raise ValueError(
            f"run_dir {text!r} is relative, but a submitted job runs in a temporary folder that Ray deletes: "
            f"give an absolute path that all nodes see (--run_dir /shared/{path.name})."
        )
    return path.resolve()


def _hub_commit(repository: str, revision: str | None) -> str:
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
            f"model.path {repository!r} is no folder here, the hub did not answer for it ({reason}), and it is not in "
            "the hub's cache: check the spelling and the network, or give a local folder."
        ) from None
