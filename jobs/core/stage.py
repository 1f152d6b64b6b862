"""Stages, which make artifacts from artifacts, and sources, the checkpoints that exist already."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.artifacts import digest

if TYPE_CHECKING:
    from jobs.core.run import Run


@dataclass(frozen=True)
class Stage:
    """One artifact to make: what it is made from, with which settings, by which version of the code.

    `build(run, folder, facts)` fills `folder` and records `facts` in its manifest. Two stages of one name are the
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
