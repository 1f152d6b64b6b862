"""A job's run: its config, its artifacts, its workers."""

import logging
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TypeVar, overload

import yaml

from cluster.artifacts import ArtifactStore, Fingerprints, digest
from cluster.connection import in_submitted_job
from cluster.locks import exclusive
from jobs.config.schema import Config
from jobs.core.facts import Facts, check_facts
from jobs.core.sources import Sources
from jobs.core.stage import Source, Stage
from jobs.core.workers import Workers

LOG = logging.getLogger("jobs.core")
F = TypeVar("F", bound=Facts)


class Run:
    """What the stages of one job share.

    parent_run: a run whose connection, embedders and fingerprints this one borrows while others run beside it.
    command: what started the job, for model cards. beside_others: replicas of other runs are on the same machines.
    """

    def __init__(
        self, config: Config, parent_run: "Run | None" = None, command: str | None = None, beside_others: bool = False
    ):
        self.config = config
        self.command: str | None = command or (parent_run.command if parent_run else None)
        self.folder = resolve_run_dir(config.run_dir)
        self.store = ArtifactStore(self.folder / "artifacts")
        cache = self.folder / "artifacts" / "fingerprints.json"
        seen = self.folder / "artifacts" / "inputs.json"
        self.sources: Sources = parent_run.sources if parent_run else Sources(Fingerprints(cache), seen)
        self.workers: Workers = Workers(config.replicas, parent_run.workers if parent_run else None, beside_others)
        self._seen: set[str] = set()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *exception) -> None:
        self.workers.close()
        if exception[0] is None:
            self.sources.fingerprints.save()

    def record_config(self, job: str) -> None:
        """Write the resolved config into the run folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        path = self.folder / f"config.{job}.yaml"
        path.write_text(text)
        LOG.debug(f"{job}: the resolved config is in {path}")

    def make(self, stage: Stage | Source) -> str:
        """Return the stage's folder (a source's path), computing what does not exist yet."""
        if isinstance(stage, Source):
            return stage.path
        folder = self.store.verify(stage.name)
        if folder is None:
            for parent in stage.parents:
                self.make(parent)
            with exclusive(
                self.store.root / f".{stage.name}.lock", partial(self._is_made, stage), self._waiting(stage)
            ):
                folder = self.store.verify(stage.name) or self._build(stage)
        elif stage.name not in self._seen:
            LOG.info(f"{stage.kind}: {stage.name} exists, reused", extra={"artifact": stage.name})
        self._seen.add(stage.name)
        return str(folder)

    def _build(self, stage: Stage) -> Path:
        """Compute a stage; other jobs on this folder wait for it meanwhile."""
        LOG.info(f"{stage.kind}: computing {stage.name}", extra={"artifact": stage.name})
        began = time.monotonic()
        is_resumed = stage.resume and self.store.begun(stage.name)
        with self.store.create(stage.name, stage.recipe, stage.resume) as (folder, facts):
            with self.workers.meter() as meter:
                stage.build(self, folder, facts)
            check_facts(stage.kind, facts)
            if not is_resumed:  # what killed attempts held is not known
                facts["gpu_seconds"] = round(meter.gpu_seconds, 3)
        LOG.debug(f"{stage.kind}: {stage.name} is made after {time.monotonic() - began:.1f} s")
        return self.store.root / stage.name

    def _is_made(self, stage: Stage) -> bool:
        return self.store.find(stage.name) is not None

    def _waiting(self, stage: Stage) -> Callable[[str], None]:
        return lambda holder: LOG.info(f"{stage.kind}: another job ({holder}) is making {stage.name}; waiting for it")

    def missing(self, stages: Iterable[Stage | Source]) -> list[Stage]:
        """Return the stages that would have to be computed."""
        return [s for s in stages if isinstance(s, Stage) and self.store.find(s.name) is None]

    @overload
    def facts(self, stage: Stage) -> Facts: ...
    @overload
    def facts(self, stage: Stage, kind: type[F]) -> F: ...
    def facts(self, stage, kind=Facts):
        """Return the manifest of a stage that exists, as the `kind` of facts that its stage notes (jobs.core.facts)."""
        return self.store.manifest(stage.name)

    def folder_of(self, stage: Stage) -> Path:
        """Return the folder of a stage that exists."""
        return self.store.root / stage.name

    def base_model(self) -> Source:
        """Return the model of the config, named by its content."""
        return self.source(self.config.model.path, "model.path", self.config.model.revision)

    def source(self, path: str, field: str, revision: str | None = None) -> Source:
        """Return a folder, named by its content, or a hub id at a commit; ValueError names `field`: no checkpoint."""
        return self.sources.find(path, field, revision)

    def resolved(self) -> Config:
        """Return the config for other processes of this run: with the absolute run_dir and the base model's commit."""
        model = self.config.model
        if (commit := self.base_model().revision) is not None:
            model = model.model_copy(update={"revision": commit})
        return self.config.model_copy(update={"run_dir": str(self.folder), "model": model})

    def base_config(self):
        """Return the config.json of the config's model, as transformers reads it; no weights are loaded."""
        from actors.checkpoint.config import read_config

        base, trusted = self.base_model(), self.config.model.trust_remote_code
        return read_config(base.path, base.revision, trusted)

    def model_spec(self, stage: Stage | Source, gpus: float = 1):
        """Return how a worker with `gpus` GPUs, if there are any, loads a stage's checkpoint, which is made first.

        A source is inspected once, before anything is computed with it. ValueError: what is wrong with it.
        """
        from actors.specs import ModelSpec

        model = self.config.model
        revision = stage.revision if isinstance(stage, Source) else None
        spec = ModelSpec(self.make(stage), model.dtype, revision, model.trust_remote_code, gpus, sharers=1)
        if isinstance(stage, Source) and not self.sources.was_seen(stage):
            with self.workers.worker("actors.checkpoint.intake:Intake") as worker:
                completed = worker.call("look", spec)["completed"]
            if completed:
                LOG.info(f"{stage.path}: the processor's files lack {', '.join(completed)}; taken from config.json")
            self.sources.note_seen(stage)
        return spec

    def embedder_identity(self, name: str) -> str:
        """Return what names a sentence-transformer in a recipe: its content if it is a folder here, else its hub id."""
        from actors.embedder import embedder_path

        folder = Path(embedder_path(name))
        if not folder.is_dir():
            return name
        return f"{name}@{digest([self.sources.fingerprints.file(p) for p in sorted(folder.rglob('*')) if p.is_file()])}"


def resolve_run_dir(text: str) -> Path:
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
