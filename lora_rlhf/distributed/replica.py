# SPDX-License-Identifier: Apache-2.0
"""Private copies of the run directory for all processes but the first.

Every process executes the whole pipeline and reads back what it wrote: adapters, log, record. Only
the first one's directory is the run; the others work in a temporary copy, which is deleted. The
machines need no shared disk.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lora_rlhf.errors import DiskError, reason

from .world import world

_LEFT_OUT = (".png", ".html", ".tmp", ".gguf")
"""Ends of names of files that no stage reads."""


def share(folder: Path) -> None:
    """Send the run directory to the processes that wait in `received`."""
    world().of_first(lambda: _read(folder))


@contextlib.contextmanager
def received() -> Iterator[Path]:
    """Receive the run directory into a temporary folder.

    Raises:
        DiskError: There is no room for it.
    """
    files = world().of_first(dict[str, bytes])
    with contextlib.ExitStack() as stack:
        try:
            made = tempfile.TemporaryDirectory(prefix="lora-rlhf-", ignore_cleanup_errors=True)
            folder = Path(stack.enter_context(made)) / "run"
            for name, content in files.items():
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        except OSError as error:
            raise DiskError(
                f"process {world().rank} cannot keep its copy of the run: {reason(error)}",
                remedy="make room, or set TMPDIR to a folder that can be written",
            ) from None
        yield folder


def _read(folder: Path) -> dict[str, bytes]:
    paths = [p for p in folder.rglob("*") if p.is_file() and p.suffix not in _LEFT_OUT]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(paths)}
