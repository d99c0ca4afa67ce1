# SPDX-License-Identifier: Apache-2.0
"""The steps of `lora-rlhf data`: labels of other tools in, tasks and labels out to them."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lora_rlhf.errors import DataError, UsageError, counted
from lora_rlhf.runs.disk import check_writable

from . import (
    argilla_format,
    foreign_formats,
    label_studio_format,
    open_webui_format,
    project,
    usage_format,
)
from .foreign_formats import Import, Names

KEY = "pseudonyms.key"
"""File of a project; with it the same person gets the same pseudonym in every import and push."""

READERS = {
    "argilla": argilla_format.read,
    "label-studio": label_studio_format.read,
    "open-webui": open_webui_format.read,
    "usage": usage_format.read,
}
WRITERS = {"argilla": argilla_format.write, "label-studio": label_studio_format.write}


def take(
    folder: Path, path: Path, tool: str, fields: Sequence[str] = (), ignore: Sequence[str] = ()
) -> list[str]:
    """Import tasks and labels into a project, which is made if there is none; returns sentences.

    Args:
        fields: `prompt=THEIRS` and `answer=THEIRS`, for names that are not known.
        ignore: Fields and questions of the file to leave out.

    Raises:
        UsageError: There is no such tool, or a field is written otherwise.
        DataError: The file is not as expected, with the place.
    """
    if tool not in READERS:
        raise UsageError(f"there is no format {tool!r}", expected=", ".join(READERS))
    names, known = _names(fields, ignore), dict[str, str]()
    there = project.load(folder) if (folder / project.FILE).exists() else None
    own = {}
    if there is not None:
        with there.store(readonly=True) as store:
            own = {task.id: task for task in store.tasks()}
            for name in store.labelers():
                known |= {foreign_formats.user_id(name): name}
                known |= {f"{label_studio_format.LABELER}{name}": name}
    imported = READERS[tool](path, names, own)
    if there is None:
        if not imported.items:  # a project would be left that nobody can label
            unused = "; ".join(f"{n} {why}" for why, n in imported.unused.items() if n)
            raise DataError(
                f"no task is in it{f' (not used: {unused})' if unused else ''}",
                where=str(path),
                expected="tasks or labels, from which a project is made",
                remedy="check that this is the right file; nothing was written",
            )
        about = {"name": folder.resolve().name, "type": _kind(imported)}
        there = project.create(folder, project.Settings.model_validate(about))
    people = {given.person for one in imported.items for given in one.replies}
    key = pseudonym_key(folder)
    named = {person: foreign_formats.pseudonym(key, tool, person) for person in people}
    tasks, labels = foreign_formats.placed(imported, own, known, named)
    with there.store() as store:
        counts, given = store.add_tasks(tasks), store.add_labels(labels)
        for labeler in {label.labeler for label in labels} if imported.guidelines else ():
            store.acknowledge(labeler, imported.guidelines)
    lines = [
        f"{folder}: {counted(counts['added'], 'task')} and {counted(given['added'], 'label')} by "
        f"{counted(len(people), 'labeler')} added; {counted(len(own), 'task')} and "
        f"{counted(given['already'], 'label')} there already"
    ]
    return lines + [f"not used: {n} {why}" for why, n in imported.unused.items() if n]


def _names(fields: Sequence[str], ignore: Sequence[str]) -> Names:
    prompt, answers = "", []
    for given in fields:
        ours, _, theirs = given.partition("=")
        if ours not in ("prompt", "answer") or not theirs:
            raise UsageError(f"--field {given}", expected="prompt=THEIRS or answer=THEIRS")
        if ours == "answer":
            answers.append(theirs)
        else:
            prompt = theirs
    return Names(prompt, tuple(answers), tuple(ignore))


def _kind(imported: Import) -> str:
    """Return the type of most tasks."""
    kinds = Counter(one.task.type for one in imported.items)
    return max(kinds, key=kinds.__getitem__, default="pair")


def put(folder: Path, out: Path, tool: str, unlabelled: bool = False) -> str:
    """Write tasks and labels of a project for another tool; returns a sentence."""
    if tool not in WRITERS:
        raise UsageError(f"there is no format {tool!r} to write", expected=", ".join(WRITERS))
    there = project.load(folder)
    check_writable(out)
    with there.store(readonly=True) as store:
        tasks, labels = store.tasks(), store.labels()
    text = there.guidelines().text
    counts = WRITERS[tool](tasks, labels, out, text, unlabelled)
    return f"{out}: " + ", ".join(
        f"{n} {what}" for what, n in sorted(counts.items(), reverse=True) if n
    )


def pseudonym_key(folder: Path) -> bytes:
    """Return the project's secret for pseudonyms; made at the first use."""
    path = folder / KEY
    if not path.exists() or not path.stat().st_size:  # empty if a process was killed here
        path.touch(mode=0o600)
        path.write_text(secrets.token_hex(32) + "\n", encoding="ascii")
    return bytes.fromhex(path.read_text(encoding="ascii").strip())
