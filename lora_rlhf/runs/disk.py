# SPDX-License-Identifier: Apache-2.0
"""Files on disk: synced and atomic writes, hashes, and the error for a full disk."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from lora_rlhf.errors import DiskError, SetupError


def check_writable(folder: Path) -> None:
    """Check that a folder, or the first above it that exists, can be written.

    Raises:
        SetupError: It cannot.
    """
    first = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not os.access(first, os.W_OK | os.X_OK if first.is_dir() else os.F_OK):
        raise SetupError(f"cannot write to {first}", remedy="give another --out")


def sha256(path: Path) -> str:
    """Return the sha256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    write_synced(temporary, text.encode())
    temporary.replace(path)


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and flush it to the disk."""
    with path.open("wb") as file:
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
