# SPDX-License-Identifier: Apache-2.0
"""One moment of a run, as it lies on the Hub: which files, under which names, and how far it is.

`backup.json` beside them says which run it is, how far, who sent it, and the sha256 of every file.
This machine's paths are replaced by words (`@@home@@`), which another machine puts its own for.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from lora_rlhf.errors import CheckpointError, HubError
from lora_rlhf.recipe.schema import Recipe
from lora_rlhf.recipe.stage_keys import keys_read, stage_names, stage_of
from lora_rlhf.reports.cards.card_markdown import code
from lora_rlhf.runs import checkpoint
from lora_rlhf.runs.disk import sha256
from lora_rlhf.runs.record import Record

from .staging import ADAPTER, scan

SCHEMA = 1
"""Of `backup.json`."""

INDEX = "backup.json"

_TEXTS = ("recipe.yaml", "record.json", "metrics.jsonl", "samples.jsonl", "skipped.jsonl")
_OF_DATA = ("samples.jsonl", "skipped.jsonl", "checkpoints/")
"""What holds rows of the data, which may speak of paths as they like."""
_PLAIN = (".json", ".yaml", ".md")
_BEFORE, _AFTER = r"(?:(?<![\w.~-])|(?<=\\[nrt]))", r"(?![\w-]|\.\w)"
"""Around a whole path: /home/ann is not in /home/anna, and is in what follows a line's end."""


def _files(run: Path) -> Iterator[str]:
    """Names, relative to the run, of what another machine needs; nothing that is not ours."""
    yield from (name for name in _TEXTS if (run / name).is_file())
    yield from (f"plots/{path.name}" for path in run.glob("plots/*.png"))
    for folder in run.glob("adapters/*"):
        if folder.suffix != ".tmp":
            named = (folder / name for name in (*ADAPTER, "README.md"))
            yield from (p.relative_to(run).as_posix() for p in named if p.is_file())
    for training in run.glob("checkpoints/*"):
        newest = checkpoint.folders(training)[:1]
        for path in [p for step in newest for p in step.iterdir()] + [*training.glob("*.json")]:
            yield path.relative_to(run).as_posix()


def copy(run: Path, folder: Path) -> None:
    """This moment of the run; weights are never changed in place, so a second name is a copy."""
    for name in _files(run):
        source, target = run / name, folder / name
        if source.is_symlink():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".safetensors":
            with contextlib.suppress(OSError):  # another disk
                os.link(source, target)
                continue
        shutil.copyfile(source, target)


def make_ready(folder: Path, recipe: Recipe, run: Path, repo_id: str, writer: str) -> list[str]:
    """Hide this machine's paths, refuse secrets, write card and index; returns all names.

    Args:
        writer: Which process sends it.

    Raises:
        HubError: A file holds what looks like a secret.
    """
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    sealed = Record.read(folder).data["files"]
    whole = {name for name in names if name in sealed and sealed[name] == sha256(folder / name)}
    words = paths(recipe, run)
    hidden = [name for name in names if swap(folder / name, name, words)]
    own = [name for name in names if not name.startswith(_OF_DATA)]
    scan(folder, own)
    scan(folder, sorted({*names} - {*own}), homes=False)
    record = Record.read(folder)
    index = {
        "schema": SCHEMA,
        "run": identity(record),
        "progress": progress(record),
        "told": told(record),
        "writer": writer,
        "hidden": hidden,
        "sealed": sorted(whole & {*hidden}),
        "files": {name: sha256(folder / name) for name in names},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_card(record, repo_id), encoding="utf-8", newline="\n")
    return sorted([*names, INDEX, "README.md"])


def paths(recipe: Recipe, run: Path) -> dict[str, str]:
    """This machine's paths -> what stands for them, the longest first."""
    keys = keys_read(recipe, "card").items()
    found = {str(Path.home()).rstrip("/"): "@@home@@", str(run.resolve()): "@@run@@"}
    found |= {
        value: f"@@{key}@@"
        for key, value in keys
        if isinstance(value, str)
        and (key == "model.id" or key.endswith(".path"))
        and Path(value).is_absolute()
    }
    return dict(sorted(found.items(), key=lambda pair: -len(pair[0])))


def swap(path: Path, name: str, words: dict[str, str]) -> bool:
    """Put one word for another in a small text file of ours; whether there was one."""
    if not name.endswith(_PLAIN) or name.endswith("tokenizer.json"):
        return False
    if name.startswith(_OF_DATA) and not name.endswith("manifest.json"):
        return False
    text = before = path.read_bytes().decode()
    for word, other in words.items():
        if path.suffix == ".json":
            word, other = (json.dumps(w)[1:-1] for w in (word, other))
        if word.startswith("@@"):
            text = text.replace(word, other)
        elif word in text and word:  # HOME may be /, which is in every path
            found = rf"{_BEFORE}{re.escape(word)}{_AFTER}"
            text = re.sub(found, lambda _, other=other: other, text)  # type: ignore[misc]
    if text != before:
        path.write_bytes(text.encode())
    return text != before


def identity(record: Record) -> dict[str, Any]:
    """What tells one run from another of the same recipe."""
    data = record.data
    return {"name": data["name"], "seed": data["seed"], "started": data["clock"]["started"]}


def progress(record: Record) -> list[int]:
    """How far a run is: finished stages, then steps (and parts) of the one in flight.

    Without the card stage, which is run again where only a card changes.
    """
    stages = stage_names(record.algorithm)[:-1]
    done = next((n for n, name in enumerate(stages) if not record.done(name)), len(stages))
    under_way = [
        training
        for training in record.checkpoints("").glob("*")
        if stage_of(training.name) in stages[done:]
    ]
    parts = sum(len([*training.glob("*.json")]) for training in under_way)
    return [done, parts + sum(map(_step, under_way))]


def _step(training: Path, *, strict: bool = False) -> int:
    """Of the newest checkpoint from which one can go on."""
    try:
        found = checkpoint.newest(training)[0]
    except CheckpointError:
        if strict:
            raise
        return 0
    return found.step if found else 0


def told(record: Record, *, strict: bool = True) -> str:
    """How far a run is, in words; unless `strict`, checkpoints that are broken count for nothing.

    Raises:
        CheckpointError: None of a training's checkpoints is complete.
    """
    done = [name for name, entry in record.data["stages"].items() if entry["status"] == "done"]
    steps = [
        f"{training.name} at step {step}"
        for training in sorted(record.checkpoints("").glob("*"))
        if (step := _step(training, strict=strict))
    ]
    return ", ".join([*(f"{name} done" for name in done), *steps]) or "nothing finished"


def _card(record: Record, repo_id: str) -> str:
    meta = yaml.safe_dump({"tags": ["lora-rlhf"]}, sort_keys=False).strip()
    return (
        f"---\n{meta}\n---\n\n# Checkpoints of {code(record.data['name'])}\n\n"
        "Unfinished work of `lora-rlhf`, kept for a machine that may not come back; not a model to "
        f"use.\n\nIt holds: {told(record)}.\n\nTo go on from here, on any machine: the same "
        f"recipe, with `checkpoint.hub: {repo_id}`, into an empty folder,\n"
        "`lora-rlhf run RECIPE --out FOLDER`.\n"
    )


def read_index(folder: Path, repo_id: str) -> dict[str, Any] | None:
    """`backup.json`; None in a repository that has none yet.

    Raises:
        HubError: It is none of this version.
    """
    path = folder / INDEX
    if not path.exists():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if found["schema"] != SCHEMA:
            raise ValueError(f"schema {found['schema']!r}, this version reads {SCHEMA}")
        names = [*found["files"], *found["hidden"], *found.setdefault("sealed", [])]
        if wrong := [n for n in names if ".." in n.split("/") or Path(n).is_absolute()]:
            raise ValueError(f"it names {wrong[0]}")
        found["run"]["started"]
        found["progress"] = [int(n) for n in found.get("progress", ())]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise broken(repo_id, f"{INDEX} cannot be read: {error}") from None
    return found


def broken(repo_id: str, what: str) -> HubError:
    """The error for a repository that no run of this version wrote, or that was changed."""
    return HubError(
        f"the checkpoints on {repo_id} cannot be used: {what}",
        expected="a repository that only `checkpoint.hub` writes to",
        remedy="give another checkpoint.hub, or restore an earlier commit of the repository",
    )
