# SPDX-License-Identifier: Apache-2.0
"""Files on disk: synced and atomic writes, hashes, signed JSON, and the errors of a disk."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_rlhf.errors import DamageError, DiskError, SetupError, UsageError

BACKUP = ".bak"
"""Suffix of the backup beside a file that every run needs."""


def check_writable(folder: Path) -> None:
    """Check that a folder, or the first above it that exists, can be written.

    Raises:
        SetupError: It cannot.
    """
    first = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not first.is_dir():
        raise SetupError(
            f"cannot write to {folder}: {first} is a file", remedy="give another place"
        )
    if not os.access(first, os.W_OK | os.X_OK):
        raise SetupError(f"cannot write to {first}", remedy="give another place")


def make_place(path: Path) -> None:
    """Make the folder of a file to be written, before the work whose result it takes.

    Raises:
        UsageError: The file's name is that of a folder.
        SetupError: The folder cannot be made or written.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder", expected="the name of a file")
    check_writable(path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)


def sha256(path: Path) -> str:
    """Return the sha256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def signed(data: Mapping[str, Any]) -> dict[str, Any]:
    """Add to plain data its own sha256, under the key `sha256`."""
    plain = {key: value for key, value in data.items() if key != "sha256"}
    text = json.dumps(plain, sort_keys=True)
    return {**plain, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def is_signed(data: Any) -> bool:
    """Return True if plain data has the right sha256 of itself."""
    return isinstance(data, dict) and "sha256" in data and signed(data)["sha256"] == data["sha256"]


def damaged(path: Path, what: str, run: Path | None = None, stage: str = "") -> DamageError:
    """Return the error for a file that is not as its run wrote it, in this stage if given."""
    new = "run the recipe into a new --out, with `--from` this run if its SFT and reward model are "
    again = new + "undamaged"
    if run is not None:
        at = shlex.quote(str(run))
        again = f"do its stage again, and the later ones: `lora-rlhf run {at} --out {at} --redo "
        again += f"{stage}`"
    return DamageError(
        f"{path}: {what}",
        expected="the file as the run wrote it",
        remedy=f"restore the file, or {again}",
    )


def write_atomically(path: Path, content: str | bytes, *, twice: bool = False) -> None:
    """Write a file, whole or not at all; a link at its place is replaced, not written through.

    Args:
        twice: Write a copy beside it, for the case that a power cut damages the file.
    """
    raw = content.encode() if isinstance(content, str) else content
    for target in (path, path.with_name(path.name + BACKUP))[: 1 + twice]:
        temporary = target.with_name(target.name + ".tmp")
        write_synced(temporary, raw)
        temporary.replace(target)
        sync(target.parent)


def append(path: Path, line: str) -> None:
    """Append to a text file, which must not be written through a link."""
    if path.exists() and (path.is_symlink() or path.stat().st_nlink > 1):
        write_atomically(path, path.read_bytes())
    with path.open("a", encoding="utf-8") as file:
        file.write(line)


def write_synced(path: Path, content: bytes) -> None:
    """Write a new file, replacing what is there, and flush it to the disk."""
    path.unlink(missing_ok=True)  # a link would be written through
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Flush a file or a folder's list of names to the disk; Windows cannot flush folders."""
    if os.name == "posix" and path.exists():
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def no_room(folder: Path, error: Exception) -> DiskError:
    """Return the error for a disk that is full or not writable."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    return DiskError(
        f"cannot write to {folder}: {getattr(error, 'strerror', None) or error} "
        f"({free / 1e6:.1f} MB free)",
        expected="room for two checkpoints",
        remedy="make room, then run the same command to continue from the last checkpoint",
    )
