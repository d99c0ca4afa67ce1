# SPDX-License-Identifier: Apache-2.0
"""A run kept on the Hub while it trains (`checkpoint.hub`), for a machine that may not come back.

The private repository holds the run directory with the newest checkpoint of each training, and
backup.json (`moment.py`). Each upload is one commit, so what is there is always one moment of the
run, and each builds on the one before: who finds another's commit there sends no more. It is sent
by a thread from a copy; nothing that happens to it can stop or change the run.
"""

from __future__ import annotations

import contextlib
import shlex
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import utils

from lora_rlhf.errors import CheckpointError, HubError, UsageError
from lora_rlhf.recipe.schema import Recipe
from lora_rlhf.runs import checkpoint
from lora_rlhf.runs.disk import sha256
from lora_rlhf.runs.progress import Progress
from lora_rlhf.runs.record import BEGINNINGS, COPY, Record

from . import repository, snapshot

FETCHED = "fetched.tmp"
"""Folder in the run directory while a fetch is at work: what lies beside it may not be whole."""

_PAUSES = (1.0, 4.0)  # the next checkpoint is the next try: no need for patience here
_NOTICED = 2.0  # seconds of waiting from which one wants to know what for


def prepare(
    recipe: Recipe, out: Path, progress: Progress, *, warm_start: bool = False
) -> repository.Repository | None:
    """Look at `checkpoint.hub` before training; fetch the run that is there into an empty `out`.

    Returns:
        The repository to send to; None where none is named, or the network is off by choice.

    Raises:
        HubError: It cannot be written to, is public, or holds another run, or a broken one.
    """
    there, repo_id = (out / "record.json").exists(), recipe.checkpoint.hub
    if (out / FETCHED).exists():
        _clear(out, everything=not there)
    shutil.rmtree(out / COPY, ignore_errors=True)  # of a process that was killed while it sent
    if repo_id is None:
        return None
    if repository.offline():
        progress.say(f"offline (HF_HUB_OFFLINE): checkpoints neither come from nor go to {repo_id}")
        return None
    again = "lora-rlhf run {0}/recipe.yaml --out {0}".format(shlex.quote(str(out)))
    remote = repository.Repository(
        repo_id, None, False, again if there else "lora-rlhf run", "keeping checkpoints", _PAUSES
    )
    remote.check_access()
    known = remote.info(repo_id)  # before what is read: a later commit is then another's
    if known is not None and not known.private:
        raise HubError(
            f"{repo_id} is a public repository, and checkpoints are nobody else's business",
            expected="a private one, or none yet: it is made",
            remedy="give another checkpoint.hub, or make that one private in its settings",
        )
    remote.head, remote.again = known.sha if known else None, again
    found = _there(remote)
    if there and found is not None:
        _compare(repo_id, found, Record.read(out))
    if found is not None and not there and {p.name for p in out.iterdir()} <= BEGINNINGS:
        _fetch(recipe, out, remote, warm_start)
        progress.say(
            f"fetched from {repo_id}: {snapshot.told(Record.read(out))}; going on from there"
        )
    return remote


@contextlib.contextmanager
def kept(
    remote: repository.Repository | None, recipe: Recipe, record: Record, progress: Progress
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
        self, remote: repository.Repository, recipe: Recipe, record: Record, progress: Progress
    ) -> None:
        self.remote, self.recipe, self.record, self.progress = remote, recipe, record, progress
        self.seconds = 60 * recipe.checkpoint.hub_minutes
        self.counts: dict[str, Any] = {"repo_id": remote.repo_id, "sent": 0, "failed": 0}
        self._thread: threading.Thread | None = None
        self._begun = float("-inf")
        self._unsent = bool(record.data["stages"])  # an earlier process may have sent less
        self._due, self._error = False, ""
        self.writer, self.taken = uuid.uuid4().hex, False

    def saved(self, whole_stage: bool) -> None:
        """There is more to go on from: send it now, if that is due and nothing is under way."""
        self._unsent = not self.taken
        self._due |= whole_stage or time.monotonic() - self._begun >= self.seconds
        if self._due and self._unsent and (self._thread is None or not self._thread.is_alive()):
            self._begin()

    def finish(self) -> None:
        """Send what is not there yet, and wait for it."""
        self._wait()
        if self._unsent and not self.taken:
            self._begin()
            self._wait()
        if self._error and not self.taken:
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
        folder = self.record.folder / COPY  # on the same disk a copy of weights is a second name
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            snapshot.copy(self.record.folder, folder)
        except OSError as error:
            self._failed(folder, error)
            return
        self._thread = threading.Thread(target=self._send, args=(folder,), daemon=True)
        self._thread.start()

    def _send(self, folder: Path) -> None:
        try:
            files = snapshot.make_ready(
                folder, self.recipe, self.record.folder, self.remote.repo_id, self.writer
            )
            title = f"Checkpoints of {self.recipe.name}"
            with _no_bars():
                self.remote.head = self.remote.mirror(folder, files, title, self._ours)
        except Exception as error:  # whatever it is, the run has nothing to do with it
            self._failed(folder, error)
            return
        shutil.rmtree(folder, ignore_errors=True)
        if self._error:
            self.progress.say(f"checkpoints are on {self.remote.repo_id} again")
        self._error = ""
        self.counts["sent"] += 1

    def _ours(self, newest: str) -> None:
        """Whether the commit to build on is our last one, its answer heard or not.

        Raises:
            HubError: It is somebody else's.
        """
        if newest == self.remote.head:
            return
        found = _there(self.remote, newest)
        if found is not None and found.get("writer") != self.writer:
            self.taken = True
            raise HubError(
                f"{self.remote.repo_id} was written to by another process: {found.get('told')}",
                remedy="end one of the two; to keep this one too, another checkpoint.hub",
            )

    def _failed(self, folder: Path, error: Exception) -> None:
        """Said once: a Hub that is away for hours must not fill the screen."""
        shutil.rmtree(folder, ignore_errors=True)
        self._unsent = not self.taken
        self.counts["failed"] += 1
        if self.taken:
            self.progress.say(f"the run goes on, but nothing more of it is sent: {error}")
        elif not self._error:
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


def _there(remote: repository.Repository, commit: str | None = None) -> dict[str, Any] | None:
    """The index of a commit, by default the newest; None where there is none."""
    with tempfile.TemporaryDirectory(prefix="lora-rlhf-backup-") as name:
        found = remote.download(Path(name), snapshot.INDEX, commit)
        return snapshot.read_index(Path(name), remote.repo_id) if found else None


# --- what is fetched -----------------------------------------------------------------------------


def _fetch(recipe: Recipe, out: Path, remote: repository.Repository, warm_start: bool) -> None:
    """The run of the repository into the empty `out`, every sum checked first; whole or not.

    Raises:
        HubError: A file is missing or changed, or it is a run of another recipe.
    """
    folder = out / FETCHED
    try:
        remote.download(folder)
        index = snapshot.read_index(folder, remote.repo_id)
        if index is None:
            raise snapshot.broken(remote.repo_id, f"it lacks {snapshot.INDEX}")
        for name, known in index["files"].items():
            if not (folder / name).is_file() or sha256(folder / name) != known:
                raise snapshot.broken(remote.repo_id, f"{name} is not as it was sent")
        words = {word: path for path, word in snapshot.paths(recipe, out).items()}
        for name in index["hidden"]:
            snapshot.swap(folder / name, name, words)
        for training in (folder / "checkpoints").glob("*"):
            checkpoint.newest(training)
        if index["sealed"]:  # they were as sealed, and are so but for this machine's paths
            record = Record.read(folder)
            record.data["files"] |= {name: sha256(folder / name) for name in index["sealed"]}
            record.save()
        Record.open(folder, recipe, warm_start=warm_start)
        # The record last: without it the folder is no run, and is fetched again.
        for name in sorted(index["files"], key=lambda name: name == "record.json"):
            if (folder / name).exists():  # another algorithm's was dropped when it was opened
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
    """Remove what a fetch left; where it was not done, what it had put in place as well."""
    for path in sorted(out.iterdir(), key=lambda path: path.name == FETCHED):
        if path.name == FETCHED or everything:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _compare(repo_id: str, found: dict[str, Any], record: Record) -> None:
    """Whether the run in the folder may take the place of what is there.

    Raises:
        HubError: That is another run, or the same one further on.
    """
    run = found["run"]
    if run != snapshot.identity(record):
        raise HubError(
            f"{repo_id} holds the checkpoints of another run: {run.get('name')}, seed "
            f"{run.get('seed')}, started {run.get('started')}",
            expected="a repository for each run",
            remedy="give another checkpoint.hub; to go on with that run, an empty --out",
        )
    if found["progress"] > snapshot.progress(record):
        raise HubError(
            f"{repo_id} is ahead of {record.folder}: there {found.get('told')}; here "
            f"{snapshot.told(record, strict=False)}",
            expected="the folder in which the run was last gone on with",
            remedy="give another --out, new or empty, which fetches what is there; to go on from "
            "here, and lose that, delete the repository first",
        )
