# SPDX-License-Identifier: Apache-2.0
"""One process at a time in a run directory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

from filelock import SoftFileLock, Timeout

from lora_rlhf.errors import BusyError, DiskError, SetupError

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = "run.lock"
"""Lock file of a run on a file system without locks; a killed process leaves it behind."""

_held: dict[str, Callable[[], None]] = {}  # by this process: folder -> check of its place


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[Callable[[], None]]:
    """Lock the run directory, creating it if needed; the lock ends with the process.

    The lock is on the folder itself, since a file would stay in the run directory when the process
    is killed. It may be taken again by the process that holds it.

    Yields:
        A function that raises SetupError if the folder was moved or removed.

    Raises:
        BusyError: Another process holds the lock.
        DiskError: The folder cannot be created.
    """
    created, key = not folder.exists(), os.path.realpath(folder)
    if key in _held:
        yield _held[key]
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(
            f"cannot write to {folder}: {error.strerror}", remedy="give another --out"
        ) from None
    before = folder.stat()

    def check_place() -> None:
        with contextlib.suppress(OSError):
            if os.path.samestat(before, folder.stat()):
                return
        raise SetupError(
            f"{folder} was moved or removed while this run was using it",
            expected="the folder in which the run began",
            remedy="to continue from the last checkpoint, give the new location as --out",
        )

    with contextlib.ExitStack() as stack:
        # Last of all, if the run was refused before anything was written.
        if created:
            stack.callback(_remove_empty, folder)
        try:
            if not _lock_folder(folder, stack):
                stack.enter_context(SoftFileLock(folder / LOCK, timeout=0))
        except (BlockingIOError, Timeout):
            raise BusyError(
                f"another process works in {folder}",
                expected="one run in a directory",
                remedy="wait for it, or give another --out",
            ) from None
        _held[key] = check_place
        stack.callback(_held.pop, key)
        yield check_place


def _lock_folder(folder: Path, stack: contextlib.ExitStack) -> bool:
    """Lock the folder itself until the stack ends; return False where that is impossible."""
    if fcntl is None:
        return False
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    stack.callback(os.close, handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # as on some network drives
        return False
    return True


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()
