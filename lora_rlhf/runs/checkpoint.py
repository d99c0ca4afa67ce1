# SPDX-License-Identifier: Apache-2.0
"""Checkpoint folders: written whole or not at all, verified before a byte of them is used.

checkpoints/TRAINING/step-00000012/
    PART.json, PART.safetensors    plain data, and the tensors that it names; nothing is pickled
    trainer_state.json             transformers' own counters
    manifest.json                  schema, step, what the run was, size and sha256 of every file

A folder is written beside its place as `*.tmp`, every file and the folder synced to the disk, and
then renamed: a folder without `.tmp` was complete once, and its sums say whether it still is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from lora_rlhf.errors import BusyError, CheckpointError, DiskError
from lora_rlhf.recipe.stage_keys import FREE

from .record import sha256

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

SCHEMA = 1
"""Of `manifest.json`."""

PARTS = ("roles", "optimizer", "random", "trainer")
"""What an exact resume needs; TRAINER_STATE comes with them."""

TRAINER_STATE = "trainer_state.json"
_NAME = re.compile(r"step-(\d{8})")


class Skipped(NamedTuple):
    """A folder that is not used, and why."""

    name: str
    why: str


@dataclass
class Checkpoint:
    """One complete folder.

    Attributes:
        run: What the run was, as flat keys: what must be equal to go on.
        notes: Small facts about the moment: `lines` of the log, `seconds`, `finished`.
    """

    folder: Path
    step: int
    run: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    def part(self, name: str) -> Any:
        """The data of one part, tensors on the CPU.

        Raises:
            CheckpointError: It cannot be read.
        """
        try:
            skeleton = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
            path = self.folder / f"{name}.safetensors"
            tensors = load_file(path) if path.exists() else {}
            return unpack(skeleton, tensors)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise lacking(self.folder, f"{name} cannot be read: {error}") from None


def lacking(folder: Path, what: str) -> CheckpointError:
    """The error for a folder from which the run cannot go on exactly."""
    return CheckpointError(
        f"{folder}: {what}",
        expected="a complete checkpoint: adapters, heads, optimizer, random states, statistics",
        remedy="`--warm-start` begins the stage again from its adapters, which is another run; "
        f"deleting {folder.parent} begins it from its start",
    )


def changed(folder: Path, rows: list[str]) -> CheckpointError:
    """The error for a checkpoint of another run.

    Args:
        rows: `  key: before -> now` of everything that differs.
    """
    return CheckpointError(
        f"{folder} is of another run:\n" + "\n".join(rows),
        expected="the same run; these may change: " + ", ".join(FREE),
        remedy="put back what differs, or give another --out; `--warm-start` begins the stage "
        "again from its adapters, which is another run",
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
    """Write `parent/step-N`, whole or not at all, in the place of one of that step.

    Args:
        parts: Name -> plain data with tensors in it.
        files: Name -> text, written as it is.

    Raises:
        DiskError: There is no room, or the folder may not be written; older ones are as they were.
    """
    folder = parent / f"step-{step:08d}"
    temporary = folder.with_name(folder.name + ".tmp")
    try:
        _fill(temporary, step, parts, files, run, notes)
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one of this step
        temporary.replace(folder)
        sync(parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise no_room(parent, error) from None
    return folder


def no_room(folder: Path, error: Exception) -> DiskError:
    """The one-line error for a disk that is full or may not be written."""
    free = shutil.disk_usage(folder).free if folder.exists() else 0
    return DiskError(
        f"cannot write to {folder}: {getattr(error, 'strerror', None) or error} "
        f"({free / 1e6:.1f} MB free)",
        expected="room for two checkpoints",
        remedy="make room, then the same command goes on from the last complete checkpoint",
    )


def room(parent: Path, parts: Mapping[str, Any]) -> None:
    """Look before the first checkpoint of a training whether two of them have room.

    Raises:
        DiskError: They have not.
    """
    tensors: dict[str, Tensor] = {}
    pack(parts, tensors)
    needed = 2 * sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if shutil.disk_usage(parent).free < needed:
        raise no_room(parent, OSError(f"two checkpoints take {needed / 1e6:.1f} MB"))


def _fill(
    temporary: Path,
    step: int,
    parts: Mapping[str, Any],
    files: Mapping[str, str],
    run: Mapping[str, Any],
    notes: Mapping[str, Any],
) -> None:
    temporary.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    sums: dict[str, dict[str, Any]] = {}

    def put(name: str, content: bytes) -> None:
        _write_synced(temporary / name, content)
        sums[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    for name, data in parts.items():
        tensors: dict[str, Tensor] = {}
        put(f"{name}.json", json.dumps(pack(data, tensors)).encode())
        if tensors:
            put(f"{name}.safetensors", save(tensors, metadata={"format": "pt"}))
    for name, text in files.items():
        put(name, text.encode())
    manifest = {
        "schema": SCHEMA,
        "step": step,
        "run": dict(run),
        "notes": dict(notes),
        "files": sums,
    }
    _write_synced(temporary / "manifest.json", json.dumps(manifest, indent=1).encode())
    sync(temporary)


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk. Windows cannot do it for folders."""
    if os.name == "posix" and path.exists():
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def prune(parent: Path, keep: int) -> None:
    """Delete all but the newest folders, and what an interrupted write left."""
    for path in folders(parent)[keep:]:
        shutil.rmtree(path, ignore_errors=True)
    for path in parent.glob("step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


# --- one run at a time ---------------------------------------------------------------------------


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run directory, which is made where there is none; free again however this ends.

    The lock is on the folder itself: there is no file that a killed process could leave behind.

    Raises:
        BusyError: Another process holds it.
        DiskError: It cannot be made.
    """
    made = not folder.exists()
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
        if made and not any(folder.iterdir()):  # refused before anything was written
            folder.rmdir()


# --- choosing ------------------------------------------------------------------------------------


def newest(parent: Path) -> tuple[Checkpoint | None, list[Skipped]]:
    """The newest complete checkpoint, and every newer folder that was passed over.

    Raises:
        CheckpointError: There are checkpoints, and none is complete.
    """
    skipped = [
        Skipped(path.name, "it was not finished") for path in sorted(parent.glob("step-*.tmp"))
    ]
    broken: list[Skipped] = []
    for folder in folders(parent):
        found = verify(folder)
        if isinstance(found, Checkpoint):
            return found, [*broken, *skipped]
        broken.append(Skipped(folder.name, found))
    if broken:
        told = "; ".join(f"{name}: {why}" for name, why in broken)
        raise lacking(parent / broken[0].name, f"no checkpoint is complete: {told}")
    return None, skipped


def newest_adapters(parent: Path) -> Checkpoint | None:
    """The newest folder whose adapters are whole, whatever else of it is not."""
    for folder in folders(parent):
        try:
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            sums = {n: manifest["files"][n]["sha256"] for n in ("roles.json", "roles.safetensors")}
            if all(sha256(folder / name) == known for name, known in sums.items()):
                return Checkpoint(folder, int(manifest["step"]), manifest["run"], sums)
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def verify(folder: Path) -> Checkpoint | str:
    """The checkpoint in a folder, every sum checked; or what is wrong, naming the file."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        files = {str(k): dict(v) for k, v in manifest["files"].items()}
        found = Checkpoint(folder, int(manifest["step"]), manifest["run"], manifest["notes"])
        schema = manifest["schema"]
    except FileNotFoundError:
        return "manifest.json is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"manifest.json cannot be read: {error!r}"
    if schema != SCHEMA:
        return f"manifest.json has schema {schema!r}, this version reads {SCHEMA}"
    wanted = [*(f"{part}.json" for part in PARTS), TRAINER_STATE]
    if missing := [name for name in (*wanted, *files) if name not in files]:
        return f"it lacks {missing[0]}"
    for name, known in files.items():
        path = folder / name
        if Path(name).name != name or not path.is_file() or path.is_symlink():
            return f"it lacks {name}"
        size = path.stat().st_size
        if size != known.get("bytes"):
            return f"{name} has {size} bytes, not {known.get('bytes')}"
        if sha256(path) != known.get("sha256"):
            return f"{name} has another sha256 than its manifest says"
    return found


def folders(parent: Path) -> list[Path]:
    """The step folders, newest first."""
    found = [p for p in parent.glob("step-*") if _NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(found, reverse=True)


# --- plain data with tensors in it ---------------------------------------------------------------

_NAMED: dict[str, Callable[..., Any]] = {}


def checkpointable_tuple(kind: type) -> type:
    """Class decorator: a NamedTuple that checkpoints may hold comes back as itself."""
    _NAMED[kind.__name__] = kind
    return kind


def pack(data: Any, tensors: dict[str, Tensor]) -> Any:
    """`data` as JSON can hold it, its tensors moved to `tensors` under numbers.

    Raises:
        TypeError: It holds something that is neither plain data nor a tensor.
    """
    if isinstance(data, Tensor):
        name = str(len(tensors))
        # A copy: slices of one rollout share memory, which the format refuses.
        tensors[name] = data.detach().cpu().clone().contiguous()
        return {"$tensor": name}
    if data is None or isinstance(data, bool | int | float | str):
        return data
    if isinstance(data, tuple):
        kind = type(data).__name__
        tag = {"$named": kind} if kind in _NAMED else {}
        return {"$tuple": [pack(item, tensors) for item in data], **tag}
    if isinstance(data, list):
        return [pack(item, tensors) for item in data]
    if isinstance(data, dict):
        if all(isinstance(key, str) and not key.startswith("$") for key in data):
            return {key: pack(item, tensors) for key, item in data.items()}
        return {"$dict": [[key, pack(item, tensors)] for key, item in data.items()]}
    raise TypeError(f"a checkpoint cannot hold {type(data).__name__}")


def unpack(data: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The reverse of `pack`."""
    if isinstance(data, list):
        return [unpack(item, tensors) for item in data]
    if not isinstance(data, dict):
        return data
    if "$tensor" in data:
        return tensors[data["$tensor"]]
    if "$tuple" in data:
        items = [unpack(item, tensors) for item in data["$tuple"]]
        return _NAMED[data["$named"]](*items) if "$named" in data else tuple(items)
    if "$dict" in data:
        return {key: unpack(item, tensors) for key, item in data["$dict"]}
    return {key: unpack(item, tensors) for key, item in data.items()}


def to_device(data: Any, device: torch.device) -> Any:
    """The same data with its tensors on a device."""
    if isinstance(data, Tensor):
        return data.to(device)
    if isinstance(data, tuple):
        items = [to_device(item, device) for item in data]
        return _NAMED[type(data).__name__](*items) if hasattr(data, "_fields") else tuple(items)
    if isinstance(data, list):
        return [to_device(item, device) for item in data]
    if isinstance(data, dict):
        return {key: to_device(item, device) for key, item in data.items()}
    return data
