# SPDX-License-Identifier: Apache-2.0
"""The steps of `lora-rlhf label`: make a project, add tasks, export labels, serve, or ask here."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from pydantic import ValidationError

from lora_rlhf.errors import UsageError, counted, first_line
from lora_rlhf.reports import agreement_report

from . import label_files, label_summary, project
from .label_server import Access, LabelServer
from .labels import TYPES
from .project import Settings
from .store import now
from .terminal import Terminal

Say = Callable[[str], None]


def make(folder: Path, tasks: Path, kind: str = "ranking") -> str:
    """Make a project from a file of tasks; returns a sentence.

    Raises:
        UsageError: There is a project already, or no such type.
        DataError: The file holds no tasks; nothing is made then.
    """
    if kind not in TYPES:
        raise UsageError(f"there is no type {kind!r}", expected=", ".join(TYPES))
    read = label_files.read_tasks(tasks, kind)
    try:
        settings = Settings.model_validate({"name": folder.resolve().name, "type": kind})
    except ValidationError as error:
        raise UsageError(f"{folder} has no name for a project: {first_line(error)}") from None
    with project.create(folder, settings).store() as store:
        store.add_tasks(read)
    made = f"{counted(len(read), 'task')}, {project.FILE} and {settings.guidelines}"
    return f"{folder}: {made}, to be edited"


def add(folder: Path, tasks: Path) -> str:
    """Add the tasks of a file to a project; returns a sentence."""
    there = project.load(folder)
    read = label_files.read_tasks(tasks, there.settings.type)
    with there.store() as store:
        counts = store.add_tasks(read)
    return f"{folder}: {counted(counts['added'], 'task')} added, {counts['already']} there already"


def export(folder: Path, path: Path, form: str | None = None, without: Collection[str] = ()) -> str:
    """Write the labels of a project to a file; returns a sentence.

    Raises:
        UsageError: The file is one of the project's own, which an export would replace.
    """
    there = project.load(folder)
    own = (project.FILE, project.STORE, there.settings.guidelines)
    if path.resolve() in [(there.folder / name).resolve() for name in own]:
        raise UsageError(f"{path} is a file of the project", remedy="give --export another file")
    with there.store(readonly=True) as store:
        about = store.labelers(), there.settings.screening.model_dump()
        return label_files.export(store.tasks(), store.labels(), path, form, without, *about)


def agreement(folder: Path, judges: Collection[Path] = ()) -> str:
    """Write `agreement.html`, agreement and a verdict on each labeler; returns the verdicts.

    Args:
        judges: Files with the rankings of automatic judges, which labelers may copy.
    """
    there = project.load(folder)
    with there.store(readonly=True) as store:
        tasks, labels, groups = store.tasks(), store.labels(), store.labelers()
    judged = [label for path in judges for label in label_summary.read_judge(path, tasks)]
    cut_offs = there.settings.screening.model_dump()
    summary = label_summary.summary(tasks, labels, groups, judged, cut_offs)
    page = there.folder / agreement_report.NAME
    agreement_report.write(summary | {"project": there.settings.name, "created": now()}, page)
    return "\n".join([*agreement_report.lines(summary), f"wrote {page}"])


def sit(folder: Path, labeler: str | None, ask: Callable[[str], str], say: Say) -> None:
    """Ask one labeler in a terminal."""
    there = project.load(folder)
    if not labeler:
        raise UsageError("--terminal needs the labeler's name", remedy="add --labeler NAME")
    with there.store() as store:
        count = Terminal(there, store, labeler, ask, say).sit()
    say(counted(count, "label"))


def serve(folder: Path, access: Access, say: Say, show: Callable[[str], object]) -> None:
    """Serve the labelling page until a signal.

    Args:
        show: Opens an address in a browser, or does nothing.
    """
    server = LabelServer(project.load(folder), access)
    if access.password is not None:
        say(f"for labelers: {server.address} (any name, and the password)")
    say(f"open {server.url}")
    say("Ctrl-C ends it; labels are saved at once")
    show(server.url)
    server.run()
