# SPDX-License-Identifier: Apache-2.0
"""Checkpoint folders: written whole or not at all, and verified before use.

checkpoints/TRAINING/step-00000012/
    PART.json, PART.safetensors    plain data, and its tensors; nothing is pickled
    trainer_state.json             transformers' own counters
    manifest.json                  schema, step, identity of the run, size and sha256 of every file,
                                   and its own sha256

A folder is written as `*.tmp`, flushed to the disk with all its files, and then renamed: a folder
without `.tmp` was complete once, and its hashes show whether it still is.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lora_rlhf.errors import CheckpointError
from lora_rlhf.recipe.stage_keys import FREE

from .disk import is_signed, no_room, sha256, signed, sync, write_synced

SCHEMA = 2
"""Version of the layout of `manifest.json`."""

PARTS = ("roles", "optimizer", "random", "trainer")
"""Parts that an exact resume needs, with TRAINER_STATE."""

TRAINER_STATE = "trainer_state.json"
_NAME = re.compile(r"step-(\d{8})")


@dataclass
class Checkpoint:
    """One complete folder.

    Attributes:
        run: Identity of the run as flat keys; all must be equal to continue.
        notes: State of the run at this step: `log` (lines and their sha256), `seconds`, `finished`.
    """

    folder: Path
    step: int
    run: dict[str, Any]
    notes: dict[str, Any]

    def part(self, name: str) -> Any:
        """Read the data of one part, tensors on the CPU.

        Raises:
            CheckpointError: The part cannot be read.
        """
        from . import tensor_tree  # imports torch, which is not needed to look for checkpoints

        try:
            return tensor_tree.read(self.folder, name)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise lacking(self.folder, f"{name} cannot be read: {error}") from None


def lacking(folder: Path, what: str) -> CheckpointError:
    """Return the error for a folder from which the run cannot continue exactly."""
    return CheckpointError(
        f"{folder}: {what}",
        expected="a complete checkpoint: adapters, heads, optimizer, random states, statistics",
        remedy="`--warm-start` restarts the stage from its adapters, which is another run; "
        f"deleting {folder.parent} restarts it from the beginning",
    )


def changed(folder: Path, rows: list[str]) -> CheckpointError:
    """Return the error for a checkpoint of another run, with rows of `  key: before -> now`."""
    return CheckpointError(
        f"{folder} is of another run:\n" + "\n".join(rows),
        expected="the same run; these may change: " + ", ".join(FREE),
        remedy="restore what differs, or give another --out; `--warm-start` restarts the stage "
        "from its adapters, which is another run",
    )


# --- writing -------------------------------------------------------------------------------------


def write(
    parent: Path,
    step: int,
    parts: Mapping[str, Any],
    files: Mapping[str, str],
    run: Mapping[str, Any],
    notes: Mapping[str, Any],
) -> Path:
    """Write `parent/step-N`, whole or not at all, replacing an earlier one of that step.

    Args:
        parts: Name -> plain data with tensors in it.
        files: Name -> text, written as it is.

    Raises:
        DiskError: There is no room, or no permission; older checkpoints are untouched.
    """
    from . import tensor_tree

    folder = parent / f"step-{step:08d}"
    temporary = folder.with_name(folder.name + ".tmp")
    sums: dict[str, dict[str, Any]] = {}
    try:
        parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()

        def put(name: str, content: bytes) -> None:
            write_synced(temporary / name, content)
            sums[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

        for part, data in parts.items():
            for name, content in tensor_tree.files(part, data).items():
                put(name, content)
        for name, text in files.items():
            put(name, text.encode())
        manifest = {
            "schema": SCHEMA,
            "step": step,
            "run": dict(run),
            "notes": dict(notes),
            "files": sums,
        }
        text = json.dumps(signed(json.loads(json.dumps(manifest))), indent=1)
        write_synced(temporary / "manifest.json", text.encode())
        sync(temporary)
        shutil.rmtree(folder, ignore_errors=True)  # a damaged checkpoint of this step
        temporary.replace(folder)
        sync(parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise no_room(parent, error) from None
    return folder


def check_room(parent: Path, parts: Mapping[str, Any]) -> None:
    """Check, before the first checkpoint of a training, that the disk has room for two.

    Raises:
        DiskError: There is no room.
    """
    from . import tensor_tree

    needed = 2 * tensor_tree.tensor_bytes(parts)
    if shutil.disk_usage(parent).free < needed:
        raise no_room(parent, OSError(f"two checkpoints take {needed / 1e6:.1f} MB"))


def prune(parent: Path, keep: int) -> None:
    """Delete all but the newest folders, and the remains of interrupted writes."""
    for path in [*folders(parent)[keep:], *parent.glob("step-*.tmp")]:
        shutil.rmtree(path, ignore_errors=True)


# --- choosing ------------------------------------------------------------------------------------


def newest(parent: Path) -> tuple[Checkpoint | None, dict[str, str]]:
    """Find the newest complete checkpoint, and the reason why each newer folder cannot be used.

    Raises:
        CheckpointError: There are checkpoints, and none is complete.
    """
    unfinished = {p.name: "it was not finished" for p in sorted(parent.glob("step-*.tmp"))}
    damaged: dict[str, str] = {}
    for folder in folders(parent):
        checkpoint = verify(folder)
        if isinstance(checkpoint, Checkpoint):
            return checkpoint, damaged | unfinished
        damaged[folder.name] = checkpoint
    if damaged:
        reasons = "; ".join(f"{name}: {why}" for name, why in damaged.items())
        raise lacking(parent / next(iter(damaged)), f"no checkpoint is complete: {reasons}")
    return None, unfinished


def newest_adapters(parent: Path) -> Checkpoint | None:
    """Find the newest folder whose adapters are intact; other parts may be damaged."""
    for folder in folders(parent):
        try:
            manifest = _manifest(folder)
            sums = {n: manifest["files"][n]["sha256"] for n in ("roles.json", "roles.safetensors")}
            if all(sha256(folder / name) == known for name, known in sums.items()):
                return Checkpoint(folder, int(manifest["step"]), manifest["run"], sums)
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def verify(folder: Path) -> Checkpoint | str:
    """Check every hash of a folder; return its checkpoint, or a message that names the bad file."""
    try:
        manifest = _manifest(folder)
        files = {str(k): dict(v) for k, v in manifest["files"].items()}
        checkpoint = Checkpoint(folder, int(manifest["step"]), manifest["run"], manifest["notes"])
    except FileNotFoundError:
        return "manifest.json is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"manifest.json cannot be read: {error!r}"
    for name in (*(f"{part}.json" for part in PARTS), TRAINER_STATE):
        if name not in files:
            return f"it lacks {name}"
    for name, known in files.items():
        path = folder / name
        if Path(name).name != name or not path.is_file() or path.is_symlink():
            return f"it lacks {name}"
        size = path.stat().st_size
        if size != known.get("bytes"):
            return f"{name} has {size} bytes, not {known.get('bytes')}"
        if sha256(path) != known.get("sha256"):
            return f"{name} has another sha256 than its manifest says"
    return checkpoint


def _manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a folder.

    Raises:
        OSError, ValueError, TypeError: It cannot be read, has another schema, or was changed.
    """
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    if (schema := manifest["schema"]) != SCHEMA:
        raise ValueError(f"it has schema {schema!r}, this version reads {SCHEMA}")
    if not is_signed(manifest):
        raise ValueError("it was changed: its own sha256 differs")
    return manifest


def folders(parent: Path) -> list[Path]:
    """List the step folders, newest first."""
    steps = [p for p in parent.glob("step-*") if _NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(steps, reverse=True)
