# SPDX-License-Identifier: Apache-2.0
"""A labelling project: a folder with project.yaml, guidelines.md and labels.sqlite."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from lora_rlhf.errors import UsageError
from lora_rlhf.recipe.loader import load_section
from lora_rlhf.recipe.schema import Rules, Section
from lora_rlhf.recipe.strict_yaml import dump_yaml
from lora_rlhf.runs.disk import write_atomically

from . import guidelines
from .guidelines import Guidelines
from .store import Sharing, Store

FILE, STORE = "project.yaml", "labels.sqlite"
VERSION = 1


class ScreeningSection(Section):
    """`screening`: soft cut-offs for labelers; the owner of the project decides."""

    flags: float = Field(0.75, ge=0, le=1)
    """Least agreement with the gold items on flags."""
    rankings: float = Field(0.75, ge=0, le=1)
    """Least agreement with the gold items on pairs of answers."""
    demonstrations: float = Field(6.0, ge=1, le=7)
    """Least mean quality of a labeler's demonstrations, from 1 to 7."""


class Settings(Section):
    """`project.yaml`."""

    version: Literal[1] = 1
    """Version of this format."""
    name: str = Field(min_length=1, max_length=200)
    """Name that labelers see."""
    type: Literal["ranking", "pair", "rating", "demonstration"] = "ranking"
    """Type of the tasks that name none."""
    guidelines: str = "guidelines.md"
    """Markdown file, in the project's folder."""
    labels_per_task: int = Field(1, ge=1, le=1000)
    """Labels that a task gets, by different people."""
    overlap: float = Field(0.2, ge=0, le=1)
    """Share of the tasks that get `labels_per_overlap` labels, to measure agreement."""
    labels_per_overlap: int = Field(2, ge=1, le=1000)
    """Labels of those tasks."""
    gold_share: float = Field(0.1, ge=0, le=1)
    """Share of gold items, whose right value is known, in what a labeler sees."""
    screening: ScreeningSection = Field(default_factory=ScreeningSection)
    seed: int = Field(0, ge=0)

    def rules(self) -> Rules:
        """The guidelines lie in the folder."""
        if Path(self.guidelines).is_absolute() or ".." in Path(self.guidelines).parts:
            yield f"guidelines: {self.guidelines!r} is not in the project's folder", "guidelines"

    def sharing(self) -> Sharing:
        """Return how tasks are shared among labelers."""
        return Sharing(
            self.labels_per_task,
            self.overlap,
            self.labels_per_overlap,
            self.gold_share,
            self.seed,
        )


@dataclass(frozen=True)
class Project:
    """A project's folder and its settings."""

    folder: Path
    settings: Settings

    def store(self, create: bool = False, readonly: bool = False) -> Store:
        """Open the store of labels."""
        store = Store(self.folder / STORE, self.settings.sharing())
        return store.open(create=create, readonly=readonly)

    def guidelines(self) -> Guidelines:
        """Read the guidelines as they are now."""
        return guidelines.read(self.folder / self.settings.guidelines)


def load(folder: str | Path) -> Project:
    """Load a project.

    Raises:
        UsageError: The folder holds none, or project.yaml is wrong, with the line.
    """
    folder = Path(folder)
    if folder.name == FILE:
        folder = folder.parent
    if not (folder / FILE).is_file():
        raise UsageError(
            "there is no labelling project here",
            where=str(folder),
            expected=f"a folder with {FILE}",
            remedy=f"make one: lora-rlhf label {shlex.quote(str(folder))} --new TASKS.jsonl",
        )
    remedy = f"correct {FILE}; docs/feedback.md lists the keys"
    return Project(folder, load_section(Settings, folder / FILE, remedy))


def create(folder: str | Path, settings: Settings) -> Project:
    """Make a project with our guidelines and an empty store.

    Raises:
        UsageError: There is a project already.
    """
    folder = Path(folder)
    for name in (FILE, STORE):
        if (folder / name).exists():
            raise UsageError(
                f"there is a project already: {name} exists",
                where=str(folder),
                expected="a new or empty folder",
                remedy="add tasks to it with --add, or give another folder",
            )
    folder.mkdir(parents=True, exist_ok=True)
    text = guidelines.PACKAGED.read_text(encoding="utf-8")
    if not (own := folder / settings.guidelines).exists():
        own.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(own, text)
    project = Project(folder, settings)
    project.store(create=True).close()
    write_atomically(folder / FILE, dump_yaml(settings.model_dump(mode="json")))
    return project
