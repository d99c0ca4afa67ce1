# SPDX-License-Identifier: Apache-2.0
"""Refuse links and names that lead out of an untrusted folder, and files that are not plain."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path

from lora_rlhf.errors import LoraRlhfError

_PLAIN = re.compile(r"[\w-][\w.-]*")
_LARGEST_INDEX = 100_000_000


def reject_escaping_links(folder: Path, error: type[LoraRlhfError]) -> None:
    """Refuse a folder with a link that leads out of it, or with anything but files and folders.

    The folder itself may be a link. The files of a snapshot in the Hub's cache are links to its
    `blobs` folder, which are allowed.

    Raises:
        LoraRlhfError: Of the class `error`; the message names the link, or the pipe or device.
    """
    top = folder.resolve()
    allowed = [top]
    if top.parent.name == "snapshots":
        allowed.append(top.parent.parent / "blobs")
    for here, folders, files in os.walk(top):
        for path in (Path(here) / name for name in (*folders, *files)):
            try:
                mode = path.lstat().st_mode
            except OSError:
                continue  # removed in the meantime
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)):
                raise error(
                    f"{folder}: {path.relative_to(top)} is a pipe, a socket or a device",
                    expected="plain files, since reading it may never end",
                    remedy="remove it, or restore the file",
                )
            if stat.S_ISLNK(mode) and not any(_leads_to(path, place) for place in allowed):
                raise error(
                    f"{folder}: {path.relative_to(top)} is a link that leads out of the folder",
                    expected="plain files, or links to files in the same folder",
                    remedy="replace the link by the file, if you know where it comes from",
                )


def _leads_to(path: Path, place: Path) -> bool:
    try:
        return path.resolve(strict=True).is_relative_to(place)
    except (OSError, RuntimeError):  # to nowhere, or in a circle
        return False


def moved(path: str, beside: Path) -> str:
    """Return where a file lies now, if a folder that holds it and `beside` was moved or renamed.

    The longest end of its old path that exists in `beside` or a folder above it; without one, the
    old path.
    """
    old = Path(path)
    if not old.is_absolute() or old.exists():
        return path
    here = beside.resolve()
    for count in range(len(old.parts) - 1, 0, -1):
        for folder in [here, *here.parents][:-1]:
            if (new := folder.joinpath(*old.parts[-count:])).exists():
                return str(new)
    return path


def reject_escaping_shards(folder: Path, error: type[LoraRlhfError]) -> None:
    """Refuse a safetensors index that names anything but plain files in its own folder.

    Raises:
        LoraRlhfError: Of the class `error`; the message names the entry.
    """
    for path in sorted(folder.glob("*.index.json")):
        try:
            if path.stat().st_size > _LARGEST_INDEX:
                raise ValueError(f"it has over {_LARGEST_INDEX} bytes")
            names = list(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
            raise error(f"{path} cannot be read: {e}", expected="an index of shards") from None
        for name in names:
            if not isinstance(name, str) or not _PLAIN.fullmatch(name):
                raise error(
                    f"{path} names {name!r:.80}",
                    expected="plain names of files in the same folder",
                    remedy="compare the folder with the original; do not trust its source",
                )
