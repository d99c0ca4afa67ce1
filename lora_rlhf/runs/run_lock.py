# SPDX-License-Identifier: Apache-2.0
"""One run at a time in a run directory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from lora_rlhf.errors import BusyError, DiskError

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock the run directory, creating it if needed; the lock ends with the process.

    The lock is on the folder itself: `filelock` would leave a file in the run directory when the
    process is killed.

    Raises:
        BusyError: Another process holds the lock.
        DiskError: The folder cannot be created.
    """
    created = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(
            f"cannot write to {folder}: {error.strerror}", remedy="give another --out"
        ) from None
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(
                f"another process works in {folder}",
                expected="one run in a directory",
                remedy="wait for it, or give another --out",
            ) from None
        except OSError:  # a file system without locks, as some network drives are
            pass
        yield
    finally:
        os.close(handle)
        if created and not any(folder.iterdir()):  # refused before anything was written
            folder.rmdir()
