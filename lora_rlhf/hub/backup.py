# SPDX-License-Identifier: Apache-2.0
"""Back a run up on the Hub while it trains (`checkpoint.hub`), and fetch it on another machine.

The private repository holds the run directory with the newest checkpoint of each training, and
`backup.json`: the identity and progress of the run, the process that wrote it, and the sha256 of
every file. Local paths are replaced by placeholders (`@@home@@`), which another machine replaces by
its own paths.

Each upload is one commit on top of the previous one, so the repository is always a consistent
snapshot. If another process has committed there, uploading stops. A thread uploads from a copy, so
that no failure can stop or change the run. At its end the history becomes one commit: the Hub
keeps, and counts, every checkpoint that is in it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import utils

from lora_rlhf.errors import CheckpointError, HubError, UsageError
from lora_rlhf.recipe.schema import Recipe
from lora_rlhf.recipe.stage_keys import keys_read, stage_names, stage_of
from lora_rlhf.reports.cards.card_markdown import code
from lora_rlhf.runs import checkpoint
from lora_rlhf.runs.disk import is_signed, sha256, signed
from lora_rlhf.runs.record import BEGINNINGS, COPY, Record, is_run

from .repository import Repository, offline
from .staging import ADAPTER, file_names, scan

if TYPE_CHECKING:
    from lora_rlhf.runs.progress import Progress

FETCHED = "fetched.tmp"
"""Folder in the run directory during a fetch; while it exists, the run may be incomplete."""

INDEX = "backup.json"
SCHEMA = 1
"""Of `backup.json`."""

_PAUSES = (1.0, 4.0)  # few retries: the next checkpoint is uploaded anyway
_QUIET_SECONDS = 2.0  # a longer wait for an upload is announced

_OF_DATA = ("report.json", "samples.jsonl", "skipped.jsonl", "checkpoints/")
"""Files with rows of the data, which may contain any path."""
_TEXTS = ("recipe.yaml", "record.json", "metrics.jsonl", *_OF_DATA[:-1])
_BEFORE, _AFTER = r"(?:(?<![\w.~-])|(?<=\\[nrt]))", r"(?![\w-]|\.\w)"
"""Ends of a path: /home/ann is not a match in /home/anna, but is one after an escaped newline."""


def prepare(
    recipe: Recipe,
    out: Path,
    progress: Progress,
    *,
    warm_start: bool = False,
    dry_run: bool = False,
) -> Repository | None:
    """Check `checkpoint.hub` before training, and fetch the run it holds into an empty `out`.

    A dry run checks only, and changes no file.

    Returns:
        The repository to upload to; None if the recipe names none, or with HF_HUB_OFFLINE=1.

    Raises:
        HubError: The repository is public, not writable, or holds another or a damaged run.
    """
    exists, repo_id = is_run(out), recipe.checkpoint.hub
    if (out / FETCHED).exists() and not dry_run:
        _clear(out, everything=not exists)
    if not dry_run:
        shutil.rmtree(
            out / COPY, ignore_errors=True
        )  # of a process that was killed while uploading
    if repo_id is None:
        return None
    if offline():
        progress.say(
            f"offline (HF_HUB_OFFLINE): checkpoints are neither fetched from nor sent to {repo_id}"
        )
        return None
    again = "lora-rlhf run {0}/recipe.yaml --out {0}".format(shlex.quote(str(out)))
    remote = Repository(
        repo_id, None, False, again if exists else "lora-rlhf run", "the checkpoint backup", _PAUSES
    )
    remote.check_access()
    info = remote.info(repo_id)  # before the index is read, so that a commit in between is noticed
    if info is not None and not info.private:
        raise HubError(
            f"{repo_id} is a public repository, and checkpoints must stay private",
            expected="a private repository, or none yet: it is created",
            remedy="give another checkpoint.hub, or make that one private in its settings",
        )
    remote.head, remote.again = info.sha if info else None, again
    index = _remote_index(remote)
    if exists and index is not None:
        _check_not_behind(repo_id, index, Record.read(out))
    if (
        index is not None
        and not exists
        and not dry_run
        and {p.name for p in out.iterdir()} <= BEGINNINGS
    ):
        _fetch(recipe, out, remote, warm_start)
        record = Record.read(out)
        progress.say(f"fetched from {repo_id}: {_summary(record, _steps(out))}; continuing there")
    return remote


@contextlib.contextmanager
def uploading(
    remote: Repository | None, recipe: Recipe, record: Record, progress: Progress
) -> Iterator[None]:
    """Upload snapshots while the run saves; upload the rest at the end, after an error as well."""
    if remote is None:
        yield
        return
    uploader = _Uploader(remote, recipe, record, progress)
    record.on_saved = uploader.saved
    try:
        yield
    finally:
        uploader.finish()


class _Uploader:
    """Uploads snapshots of a run, one at a time, at most every `checkpoint.hub_minutes`."""

    def __init__(
        self, remote: Repository, recipe: Recipe, record: Record, progress: Progress
    ) -> None:
        self.remote, self.recipe, self.record, self.progress = remote, recipe, record, progress
        self.title = f"Checkpoints of {recipe.name}"
        self.seconds = 60 * recipe.checkpoint.hub_minutes
        self.counts: dict[str, Any] = {"repo_id": remote.repo_id, "sent": 0, "failed": 0}
        self._thread: threading.Thread | None = None
        self._started = float("-inf")
        self._unsent = bool(record.data["stages"])  # an earlier process may have sent less
        self._due, self._error = False, ""
        self.writer, self.taken = uuid.uuid4().hex, False

    def saved(self, whole_stage: bool) -> None:
        """Start an upload if one is due and none is under way."""
        self._unsent = not self.taken
        self._due |= whole_stage or time.monotonic() - self._started >= self.seconds
        if self._due and self._unsent and (self._thread is None or not self._thread.is_alive()):
            self._start()

    def finish(self) -> None:
        """Wait for the upload under way, then upload what was saved since."""
        self._wait()
        if self._unsent and not self.taken:
            self._start()
            self._wait()
        if self.counts["sent"] and not self._error and self.record.done("card"):
            self._squash()
        if self._error and not self.taken:
            self.progress.say(
                f"{self.remote.repo_id} does not hold the end of this run; {self.record.folder} "
                f"does. To upload it: `{self.remote.again}`"
            )
        self.record.data["clock"]["backup"] = self.counts
        with contextlib.suppress(OSError):  # a full disk has its own message
            self.record.save()

    def _squash(self) -> None:
        title = f"The finished run {self.recipe.name}"
        try:
            self.remote.squash(title, {title, self.title}, self._check_parent)
        except Exception as error:  # the run is there, with its history
            self.progress.say(f"the history of {self.remote.repo_id} is kept: {error}")

    def _wait(self) -> None:
        if self._thread is None:
            return
        self._thread.join(_QUIET_SECONDS)
        if self._thread.is_alive():
            self.progress.say(
                f"waiting for the upload to {self.remote.repo_id}; Ctrl-C again quits without it"
            )
            self._thread.join()

    def _start(self) -> None:
        self._unsent = self._due = False
        self._started, self._thread = time.monotonic(), None
        folder = self.record.folder / COPY  # on the same disk weights are hard-linked, not copied
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            _copy(self.record.folder, folder)
        except OSError as error:
            self._failed(folder, error)
            return
        self._thread = threading.Thread(target=self._upload, args=(folder,), daemon=True)
        self._thread.start()

    def _upload(self, folder: Path) -> None:
        try:
            files = _make_ready(
                folder, self.recipe, self.record.folder, self.remote.repo_id, self.writer
            )
            with _no_progress_bars():
                self.remote.head = self.remote.mirror(folder, files, self.title, self._check_parent)
        except Exception as error:  # no failure of an upload may reach the run
            self._failed(folder, error)
            return
        shutil.rmtree(folder, ignore_errors=True)
        if self._error:
            self.progress.say(f"checkpoints are uploaded to {self.remote.repo_id} again")
        self._error = ""
        self.counts["sent"] += 1

    def _check_parent(self, newest: str) -> None:
        """Refuse to build on a commit of another process, but not on our own with a lost answer."""
        if newest == self.remote.head:
            return
        index = _remote_index(self.remote, newest)
        if index is not None and index.get("writer") != self.writer:
            self.taken = True
            raise HubError(
                f"{self.remote.repo_id} was written to by another process: {index.get('told')}",
                remedy="stop one of the two; to keep both, give one another checkpoint.hub",
            )

    def _failed(self, folder: Path, error: Exception) -> None:
        """Report the first of several failures, so that a long outage does not fill the screen."""
        shutil.rmtree(folder, ignore_errors=True)
        self._unsent = not self.taken
        self.counts["failed"] += 1
        if self.taken:
            self.progress.say(f"the run goes on, but its checkpoints are no longer sent: {error}")
        elif not self._error:
            self.progress.say(
                f"the run goes on, but its checkpoints are only local: {error}\n"
                "  the next checkpoint tries again"
            )
        self._error = str(error) or type(error).__name__


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Hide huggingface_hub's bars, which would overwrite the progress line of the stage."""
    shown = not utils.are_progress_bars_disabled()  # type: ignore[attr-defined]
    utils.disable_progress_bars()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if shown:
            utils.enable_progress_bars()  # type: ignore[attr-defined]


# --- the snapshot that is uploaded ---------------------------------------------------------------


def _copy(run: Path, folder: Path) -> None:
    """Copy the files needed to continue a run; hard-link weights, which never change in place."""
    sources = [*(run / name for name in _TEXTS), *run.glob("plots/*.png")]
    for adapter in run.glob("adapters/*"):
        if adapter.suffix != ".tmp":
            sources += [adapter / name for name in (*ADAPTER, "README.md")]
    for training in run.glob("checkpoints/*"):
        sources += training.glob("*.json")
        for step in checkpoint.folders(training)[:1]:
            sources += step.iterdir()
    for source in sources:
        if source.is_symlink() or not source.is_file():
            continue
        target = folder / source.relative_to(run)
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".safetensors":
            with contextlib.suppress(OSError):  # another disk
                os.link(source, target)
                continue
        shutil.copyfile(source, target)


def _make_ready(folder: Path, recipe: Recipe, run: Path, repo_id: str, writer: str) -> list[str]:
    """Hide local paths, refuse secrets, write card and index; return all names."""
    names = file_names(folder)
    listed = Record.read(folder).listed()
    whole = {name for name in names if name in listed and listed[name] == sha256(folder / name)}
    placeholders = _placeholders(recipe, run)
    hidden = [name for name in names if _swap(folder / name, name, placeholders)]
    own = [name for name in names if not name.startswith(_OF_DATA)]
    scan(folder, own)
    scan(folder, sorted({*names} - {*own}), paths=False)
    record, steps = Record.read(folder), _steps(folder)
    summary = _summary(record, steps)
    index = {
        "schema": SCHEMA,
        "run": _identity(record),
        "progress": _progress(record, steps),
        "told": summary,
        "writer": writer,
        "hidden": hidden,
        "sealed": sorted(whole & {*hidden}),
        "files": {name: sha256(folder / name) for name in names},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    meta = yaml.safe_dump({"tags": ["lora-rlhf"]})
    card = (
        f"---\n{meta}---\n\n# Checkpoints of {code(record.data['name'])}\n\n"
        "Unfinished work of `lora-rlhf`, backed up in case its machine is lost; not a model to "
        f"use.\n\nIt holds: {summary}.\n\nTo continue from here, on any machine: the same "
        f"recipe, with `checkpoint.hub: {repo_id}`, into an empty folder,\n"
        "`lora-rlhf run RECIPE --out FOLDER`.\n"
    )
    (folder / "README.md").write_text(card, encoding="utf-8", newline="\n")
    return sorted([*names, INDEX, "README.md"])


def _placeholders(recipe: Recipe, run: Path) -> dict[str, str]:
    """Map this machine's paths to placeholders, the longest path first."""
    pairs = {str(Path.home()).rstrip("/"): "@@home@@", str(run.resolve()): "@@run@@"}
    for key, value in keys_read(recipe, "card").items():
        names_path = key == "model.id" or key.endswith(".path")
        if names_path and isinstance(value, str) and Path(value).is_absolute():
            pairs[value] = f"@@{key}@@"
    return dict(sorted(pairs.items(), key=lambda pair: -len(pair[0])))


def _swap(path: Path, name: str, words: dict[str, str]) -> bool:
    """Replace paths by placeholders, or the reverse, in a text file; return whether it changed.

    Tokenizers and files with rows of the data are left as they are.
    """
    if not name.endswith((".json", ".yaml", ".md")) or name.endswith("tokenizer.json"):
        return False
    if name.startswith(_OF_DATA) and not name.endswith("manifest.json"):
        return False
    text = before = path.read_bytes().decode()
    for word, other in words.items():
        if path.suffix == ".json":
            word, other = (json.dumps(w)[1:-1] for w in (word, other))
        if word.startswith("@@"):
            text = text.replace(word, other)
        elif word in text and word:  # HOME may be /, which is in every path
            whole = rf"{_BEFORE}{re.escape(word)}{_AFTER}"
            text = re.sub(whole, lambda _, other=other: other, text)  # type: ignore[misc]
    if text == before:
        return False
    if path.name in ("record.json", "manifest.json") and is_signed(json.loads(before)):
        text = json.dumps(signed(json.loads(text)), indent=1)
    path.write_bytes(text.encode())
    return True


# --- how far a run is ----------------------------------------------------------------------------


def _identity(record: Record) -> dict[str, Any]:
    """Return facts that differ between two runs of one recipe."""
    data = record.data
    return {"name": data["name"], "seed": data["seed"], "started": data["clock"]["started"]}


def _steps(run: Path, *, strict: bool = True) -> dict[str, int]:
    """Map training to step of its newest complete checkpoint; with `strict`, each must have one."""
    steps: dict[str, int] = {}
    for training in sorted(run.glob("checkpoints/*")):
        try:
            newest, _ = checkpoint.newest(training)
        except CheckpointError:
            if strict:
                raise
        else:
            steps |= {training.name: newest.step} if newest else {}
    return steps


def _progress(record: Record, steps: dict[str, int]) -> list[int]:
    """Return finished stages, then steps and parts of the next one; larger means further.

    The card stage does not count: it runs again whenever a card changes.
    """
    stages = stage_names(record.algorithm)[:-1]
    done = next((n for n, name in enumerate(stages) if not record.done(name)), len(stages))
    in_flight = [
        training
        for training in record.checkpoints("").glob("*")
        if stage_of(training.name) in stages[done:]
    ]
    return [done, sum(len([*t.glob("*.json")]) + steps.get(t.name, 0) for t in in_flight)]


def _summary(record: Record, steps: dict[str, int]) -> str:
    """Describe how far a run is: "sft done, reward at step 3"."""
    done = [name for name, entry in record.data["stages"].items() if entry["status"] == "done"]
    at = [f"{training} at step {step}" for training, step in steps.items() if step]
    return ", ".join([*(f"{name} done" for name in done), *at]) or "nothing finished"


# --- what is on the Hub --------------------------------------------------------------------------


def _remote_index(remote: Repository, commit: str | None = None) -> dict[str, Any] | None:
    """Download the index of a commit, by default the newest; None if there is none."""
    with tempfile.TemporaryDirectory(prefix="lora-rlhf-backup-") as name:
        remote.download(Path(name), INDEX, commit)
        return _read_index(Path(name), remote.repo_id)


def _read_index(folder: Path, repo_id: str) -> dict[str, Any] | None:
    """Read and check `backup.json`; None if the repository has none yet."""
    path = folder / INDEX
    if not path.exists():
        return None
    try:
        index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if index["schema"] != SCHEMA:
            raise ValueError(f"schema {index['schema']!r}, this version reads {SCHEMA}")
        names = [*dict(index["files"]), *index["hidden"], *index.setdefault("sealed", [])]
        if wrong := [n for n in names if ".." in n.split("/") or Path(n).is_absolute()]:
            raise ValueError(f"it names {wrong[0]}")
        index["run"]["started"]
        index["progress"] = [int(n) for n in index.get("progress", ())]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(repo_id, f"{INDEX} cannot be read: {error}") from None
    return index


def _damaged(repo_id: str, what: str) -> HubError:
    return HubError(
        f"the checkpoints on {repo_id} cannot be used: {what}",
        expected="a repository that only `checkpoint.hub` writes to",
        remedy="give another checkpoint.hub, or restore an earlier commit of the repository",
    )


def _check_not_behind(repo_id: str, index: dict[str, Any], record: Record) -> None:
    """Refuse to replace another run on the Hub, or the same run at a later step."""
    run, steps = index["run"], _steps(record.folder, strict=False)
    if run != _identity(record):
        raise HubError(
            f"{repo_id} holds the checkpoints of another run: {run.get('name')}, seed "
            f"{run.get('seed')}, started {run.get('started')}",
            expected="one repository per run",
            remedy="give another checkpoint.hub; to continue that run, an empty --out",
        )
    if index["progress"] > _progress(record, steps):
        raise HubError(
            f"{repo_id} is ahead of {record.folder}: there {index.get('told')}; here "
            f"{_summary(record, steps)}",
            expected="the folder in which the run was last continued",
            remedy="give another --out, new or empty, which fetches what is there; to continue "
            "from here, and lose that, delete the repository first",
        )


def _fetch(recipe: Recipe, out: Path, remote: Repository, warm_start: bool) -> None:
    """Fetch the run into the empty `out`, whole or not at all, after every hash is checked."""
    folder = out / FETCHED
    try:
        remote.download(folder)
        index = _read_index(folder, remote.repo_id)
        if index is None:
            raise _damaged(remote.repo_id, f"it lacks {INDEX}")
        for name, known in index["files"].items():
            if not (folder / name).is_file() or sha256(folder / name) != known:
                raise _damaged(remote.repo_id, f"{name} is not as it was sent")
        local_paths = {word: path for path, word in _placeholders(recipe, out).items()}
        for name in index["hidden"]:
            _swap(folder / name, name, local_paths)
        _steps(folder)
        if index["sealed"]:  # as they were listed, but for the paths of this machine
            record = Record.read(folder)
            record.rehash(index["sealed"])
            record.save()
        Record.open(folder, recipe, warm_start=warm_start)
        # The record is moved last: a folder without it is not a run, and is fetched again.
        for name in sorted(index["files"], key=lambda name: name == "record.json"):
            if (folder / name).exists():  # Record.open drops another algorithm's checkpoints
                (out / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).replace(out / name)
    except (UsageError, CheckpointError) as error:
        raise HubError(
            error.given.replace(str(folder), remote.repo_id),
            expected=error.expected,
            remedy="give the recipe of that run, or another checkpoint.hub",
        ) from None
    finally:
        _clear(out, everything=not (out / "record.json").exists())


def _clear(out: Path, *, everything: bool) -> None:
    """Remove the folder of a fetch; with `everything`, also the files moved out of it."""
    for path in sorted(out.iterdir(), key=lambda path: path.name == FETCHED):
        if path.name == FETCHED or everything:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
