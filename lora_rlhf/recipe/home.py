# SPDX-License-Identifier: Apache-2.0
"""Paths that begin with the home folder, which no shell replaces in `--out=~/x` or in YAML."""

from __future__ import annotations

import os
import re
from pathlib import Path

from lora_rlhf.errors import UsageError

_HOME = re.compile(r"\$(?:HOME|\{HOME\})(?=/|$)")


def expanded(path: str) -> str:
    """Return a path with the home folder in place of `~`, `$HOME` or `${HOME}` at its beginning.

    No other variable is read: a recipe could put its value into a record.
    """
    return os.path.expanduser(_HOME.sub("~", path, count=1) if path.startswith("$") else path)


def given(path: Path) -> Path:
    """Return a path of a command line, expanded.

    Raises:
        UsageError: It would make or read a folder called `~NAME` or `$NAME` that is not there.
    """
    path = Path(expanded(str(path)))
    first = path.parts[0] if path.parts else ""
    if first.startswith(("~", "$")) and not os.path.lexists(first):
        raise UsageError(
            f"{path}: there is no {first} here, and only ~ and $HOME are replaced",
            expected="a path as it is",
            remedy=f"write it out; a new folder of this name is ./{first}",
        )
    return path
