# SPDX-License-Identifier: Apache-2.0
"""A run kept on the Hub while it trains (`checkpoint.hub`), for a machine that may not come back.

The private repository holds the run directory with the newest checkpoint of each training, and
backup.json: which run it is, and the sha256 of every file. Each upload is one commit, so what is
there is always one moment of the run. It is sent by a thread from a copy; nothing that happens to
it can stop or change the run.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import utils

from . import checkpoint, hub
from .card_text import code
from .config import Recipe
from .errors import CheckpointError, HubError, UsageError
from .progress import Progress
from .readers import keys_read
from .record import BEGINNINGS, Record, sha256
from .staging import ADAPTER, scan

SCHEMA = 1
"""Of `backup.json`."""

INDEX = "backup.json"
FETCHED = "fetched.tmp"
"""Folder in the run directory while a fetch is at work: what lies beside it may not be whole."""

_PAUSES = (1.0, 4.0)  # the next checkpoint is the next try: no need for patience here
_NOTICED = 2.0  # seconds of waiting from which one wants to know what for
_TEXTS = ("recipe.yaml", "record.json", "metrics.jsonl", "samples.jsonl", "skipped.jsonl")
_OF_DATA = ("samples.jsonl", "skipped.jsonl", "checkpoints/")
"""What holds rows of the data, which may speak of paths as they like."""
_PLAIN = (".json", ".yaml", ".md")


def prepare(
    recipe: Recipe, out: Path, progress: Progress, *, warm_start: bool = False
) -> hub.Repository | None:
    """Look at `checkpoint.hub` before training; fetch the run that is there into an empty `out`.

    Returns:
        The repository to send to; None where none is named, or the network is off by choice.

    Raises:
        HubError: It cannot be written to, is public, or holds another run, or a broken one.
    """
    there, repo_id = (out / "record.json").exists(), recipe.checkpoint.hub
    if (out / FETCHED).exists():
        _clear(out, everything=not there)
    if repo_id is None:
        return None
    if hub.offline():
        progress.say(f"offline (HF_HUB_OFFLINE): checkpoints neither come from nor go to {repo_id}")
        return None
    again = "lora-rlhf run {0}/recipe.yaml --out {0}".format(shlex.quote(str(out)))
    remote = hub.Repository(
        repo_id, None, False, again if there else "lora-rlhf run", "keeping checkpoints", _PAUSES
    )
    remote.check_access()
    if remote.visibility(repo_id) is False:
        raise HubError(
            f"{repo_id} is a public repository, and checkpoints are nobody else's business",
            expected="a private one, or none yet: it is made",
            remedy="give another checkpoint.hub, or make that one private in its settings",
        )
    with tempfile.TemporaryDirectory(prefix="lora-rlhf-backup-") as name:
        found = _index(Path(name), repo_id) if remote.download(Path(name), INDEX) else None
    remote.again = again
    if there and found is not None and found["run"] != _identity(Record.read(out)):
        raise _other_run(repo_id, found)
    if found is not None and not there and {p.name for p in out.iterdir()} <= BEGINNINGS:
        _fetch(recipe, out, remote, warm_start)
        progress.say(f"fetched from {repo_id}: {_told(Record.read(out))}; going on from there")
    return remote


@contextlib.contextmanager
def kept(
    remote: hub.Repository | None, recipe: Recipe, record: Record, progress: Progress
) -> Iterator[None]:
    """Send what the run saves inside; however it is left, the last of it is sent before that."""
    if remote is None:
        yield
        return
    sender = _Sender(remote, recipe, record, progress)
    record.on_saved = sender.saved
    try:
        yield
    finally:
        sender.finish()


class _Sender:
    """Sends moments of a run, one at a time."""

    def __init__(
        self, remote: hub.Repository, recipe: Recipe, record: Record, progress: Progress
    ) -> None:
        self.remote, self.recipe, self.record, self.progress = remote, recipe, record, progress
        self.seconds = 60 * recipe.checkpoint.hub_minutes
        self.counts: dict[str, Any] = {"repo_id": remote.repo_id, "sent": 0, "failed": 0}
        self._thread: threading.Thread | None = None
        self._begun = float("-inf")
        self._unsent = bool(record.data["stages"])  # an earlier process may have sent less
        self._due, self._error = False, ""

    def saved(self, whole_stage: bool) -> None:
        """There is more to go on from: send it now, if that is due and nothing is under way."""
        self._unsent = True
        self._due |= whole_stage or time.monotonic() - self._begun >= self.seconds
        if self._due and (self._thread is None or not self._thread.is_alive()):
            self._begin()

    def finish(self) -> None:
        """Send what is not there yet, and wait for it."""
        self._wait()
        if self._unsent:
            self._begin()
            self._wait()
        if self._error:
            self.progress.say(
                f"{self.remote.repo_id} does not hold the last of this run, {self.record.folder} "
                f"does; to send it: `{self.remote.again}`"
            )
        self.record.data["clock"]["backup"] = self.counts
        with contextlib.suppress(OSError):  # a full disk has its own message
            self.record.save()

    def _wait(self) -> None:
        if self._thread is None:
            return
        self._thread.join(_NOTICED)
        if self._thread.is_alive():
            self.progress.say(f"sending to {self.remote.repo_id}; a second signal does not wait")
            self._thread.join()

    def _begin(self) -> None:
        self._unsent = self._due = False
        self._begun, self._thread = time.monotonic(), None
        folder = Path()
        try:
            folder = Path(tempfile.mkdtemp(prefix="lora-rlhf-backup-"))
            _copy(self.record.folder, folder)
        except OSError as error:
            self._failed(folder, error)
            return
        self._thread = threading.Thread(target=self._send, args=(folder,), daemon=True)
        self._thread.start()

    def _send(self, folder: Path) -> None:
        try:
            files = _make_ready(folder, self.recipe, self.record.folder, self.remote.repo_id)
            with _no_bars():
                self.remote.mirror(folder, files, f"Checkpoints of {self.recipe.name}")
        except Exception as error:  # whatever it is, the run has nothing to do with it
            self._failed(folder, error)
            return
        shutil.rmtree(folder, ignore_errors=True)
        if self._error:
            self.progress.say(f"checkpoints are on {self.remote.repo_id} again")
        self._error = ""
        self.counts["sent"] += 1

    def _failed(self, folder: Path, error: Exception) -> None:
        """Said once: a Hub that is away for hours must not fill the screen."""
        if folder.name:
            shutil.rmtree(folder, ignore_errors=True)
        self._unsent = True
        self.counts["failed"] += 1
        if not self._error:
            self.progress.say(
                f"the run goes on, but its checkpoints are only here: {error}\n"
                "  the next checkpoint tries again"
            )
        self._error = str(error) or type(error).__name__


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """The client's bars would be drawn across the line of the stage that trains meanwhile."""
    shown = not utils.are_progress_bars_disabled()  # type: ignore[attr-defined]
    utils.disable_progress_bars()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if shown:
            utils.enable_progress_bars()  # type: ignore[attr-defined]


# --- what is sent --------------------------------------------------------------------------------


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


def _copy(run: Path, folder: Path) -> None:
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


def _make_ready(folder: Path, recipe: Recipe, run: Path, repo_id: str) -> list[str]:
    """Hide this machine's paths, refuse secrets, write card and index; returns all names.

    Raises:
        HubError: A file holds what looks like a secret.
    """
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    hidden = [name for name in names if _swap(folder / name, name, _paths(recipe, run))]
    own = [name for name in names if not name.startswith(_OF_DATA)]
    scan(folder, own)
    scan(folder, sorted({*names} - {*own}), homes=False)
    record = Record.read(folder)
    index = {
        "schema": SCHEMA, "run": _identity(record), "hidden": hidden,
        "files": {name: sha256(folder / name) for name in names},
    }  # fmt: skip
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_card(record, repo_id), encoding="utf-8", newline="\n")
    return sorted([*names, INDEX, "README.md"])


def _paths(recipe: Recipe, run: Path) -> dict[str, str]:
    """This machine's paths -> what stands for them, the longest first."""
    keys = keys_read(recipe, "card").items()
    found = {str(Path.home()): "@@home@@", str(run.resolve()): "@@run@@"}
    found |= {
        value: f"@@{key}@@" for key, value in keys
        if isinstance(value, str) and (key == "model.id" or key.endswith(".path"))
        and Path(value).is_absolute()
    }  # fmt: skip
    return dict(sorted(found.items(), key=lambda pair: -len(pair[0])))


def _swap(path: Path, name: str, words: dict[str, str]) -> bool:
    """Put one word for another in a small text file of ours; whether there was one."""
    if not name.endswith(_PLAIN) or name.endswith("tokenizer.json"):
        return False
    if name.startswith(_OF_DATA) and not name.endswith("manifest.json"):
        return False
    text = before = path.read_bytes().decode()
    for word, other in words.items():
        if path.suffix == ".json":
            word, other = (json.dumps(w)[1:-1] for w in (word, other))
        text = text.replace(word, other)
    if text != before:
        path.write_bytes(text.encode())
    return text != before


def _identity(record: Record) -> dict[str, Any]:
    """What tells one run from another of the same recipe."""
    data = record.data
    return {"name": data["name"], "seed": data["seed"], "started": data["clock"]["started"]}


def _told(record: Record) -> str:
    """How far a run is, in words."""
    done = [name for name, entry in record.data["stages"].items() if entry["status"] == "done"]
    steps = [
        f"{training.name} at step {found.step}"
        for training in sorted(record.checkpoints("").glob("*"))
        if (found := checkpoint.newest(training)[0])
    ]
    return ", ".join([*(f"{name} done" for name in done), *steps]) or "nothing finished"


def _card(record: Record, repo_id: str) -> str:
    meta = yaml.safe_dump({"tags": ["lora-rlhf"]}, sort_keys=False).strip()
    return (
        f"---\n{meta}\n---\n\n# Checkpoints of {code(record.data['name'])}\n\n"
        "Unfinished work of `lora-rlhf`, kept for a machine that may not come back; not a model to "
        f"use.\n\nIt holds: {_told(record)}.\n\nTo go on from here, on any machine: the same "
        f"recipe, with `checkpoint.hub: {repo_id}`, into an empty folder,\n"
        "`lora-rlhf run RECIPE --out FOLDER`.\n"
    )


# --- what is fetched -----------------------------------------------------------------------------


def _index(folder: Path, repo_id: str) -> dict[str, Any] | None:
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
        names = [*found["files"], *found["hidden"]]
        if wrong := [n for n in names if ".." in n.split("/") or Path(n).is_absolute()]:
            raise ValueError(f"it names {wrong[0]}")
        found["run"]["started"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _broken(repo_id, f"{INDEX} cannot be read: {error}") from None
    return found


def _fetch(recipe: Recipe, out: Path, remote: hub.Repository, warm_start: bool) -> None:
    """The run of the repository into the empty `out`, every sum checked first; whole or not.

    Raises:
        HubError: A file is missing or changed, or it is a run of another recipe.
    """
    folder = out / FETCHED
    try:
        remote.download(folder)
        index = _index(folder, remote.repo_id)
        if index is None:
            raise _broken(remote.repo_id, f"it lacks {INDEX}")
        for name, known in index["files"].items():
            if not (folder / name).is_file() or sha256(folder / name) != known:
                raise _broken(remote.repo_id, f"{name} is not as it was sent")
        words = {word: path for path, word in _paths(recipe, out).items()}
        for name in index["hidden"]:
            _swap(folder / name, name, words)
        for training in (folder / "checkpoints").glob("*"):
            checkpoint.newest(training)
        Record.open(folder, recipe, warm_start=warm_start)
        # The record last: without it the folder is no run, and is fetched again.
        for name in sorted(index["files"], key=lambda name: name == "record.json"):
            if (folder / name).exists():  # another algorithm's was dropped when it was opened
                (out / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).replace(out / name)
    except (UsageError, CheckpointError) as error:
        raise HubError(
            error.given.replace(str(folder), remote.repo_id), expected=error.expected,
            remedy="give the recipe of that run, or another checkpoint.hub",
        ) from None  # fmt: skip
    finally:
        _clear(out, everything=not (out / "record.json").exists())


def _clear(out: Path, *, everything: bool) -> None:
    """Remove what a fetch left; where it was not done, what it had put in place as well."""
    for path in sorted(out.iterdir(), key=lambda path: path.name == FETCHED):
        if path.name == FETCHED or everything:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _broken(repo_id: str, what: str) -> HubError:
    return HubError(
        f"the checkpoints on {repo_id} cannot be used: {what}",
        expected="a repository that only `checkpoint.hub` writes to",
        remedy="give another checkpoint.hub, or restore an earlier commit of the repository",
    )


def _other_run(repo_id: str, found: dict[str, Any]) -> HubError:
    run = found["run"]
    return HubError(
        f"{repo_id} holds the checkpoints of another run: {run.get('name')}, seed "
        f"{run.get('seed')}, started {run.get('started')}",
        expected="a repository for each run",
        remedy="give another checkpoint.hub; to go on with that run, an empty --out",
    )
