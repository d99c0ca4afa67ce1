# SPDX-License-Identifier: Apache-2.0
"""Publish adapters on the Hub: one repository each, one commit each, private unless asked.

The only module that talks to the Hub. Everything that can be refused is refused before the first
byte is sent; what was trained stays where it is whatever happens here, and a push can be repeated:
files that are there already are not sent again.
"""

from __future__ import annotations

import functools
import shlex
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelInfo,
    constants,
    get_token,
    set_client_factory,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import _http, validate_repo_id  # type: ignore[attr-defined]

from lora_rlhf.errors import HubError
from lora_rlhf.recipe.schema import Recipe
from lora_rlhf.reports.cards.card_facts import hub_base
from lora_rlhf.runs.record import Record
from lora_rlhf.runtime import interrupts

from .staging import check_adapter, local_base, stage_adapter, stage_base, to_push

T = TypeVar("T")

PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before each new try, where the Hub does not say how long to wait."""
_LONGEST_PAUSE = 60.0
_LICENCE_SECONDS = 10.0
_SILENCE_SECONDS = 60.0  # the client sets no limit: a dead connection would hold a run for ever
# 409, 412: somebody else committed meanwhile; a new try builds on their commit, if it may.
_PASSING = frozenset({408, 409, 412, 425, 429, 500, 502, 503, 504})
# The base class of connection errors and time-outs, whichever HTTP library huggingface_hub uses.
_TRANSPORT: type[Exception] = HfHubHTTPError.__mro__[1]


def push(
    record: Record, role: str, repo_id: str, *, public: bool = False, token: str | None = None
) -> dict[str, Any]:
    """Publish the adapter of `role` with its card, in one commit.

    Args:
        record: The run, its last stage finished.
        role: policy, reward, value or sft.
        repo_id: organisation/name; the repository is made where there is none.
        public: Whether a new repository is public; a repository that is there keeps what it is.
        token: Default: the one of `hf auth login` or HF_TOKEN.

    Returns:
        `url`, `commit`, `files`, `private`, and `notes` on what the user should know.

    Raises:
        UsageError: No such role.
        HubError: Refused before anything was sent, or the Hub could not be reached; the message
            holds the command that tries again.
    """
    again = f"lora-rlhf push {shlex.quote(str(record.folder))} --{role} {repo_id}"
    hub = Repository(repo_id, token, public, again, f"the push of the {role} adapter")
    base, model = check_adapter(record, role), record.data["model"]
    if model.get("source") == "Hub" and not model.get("license"):  # trained without a network
        model["license"] = base_licence(model, token)
        record.save()
    with tempfile.TemporaryDirectory(prefix="lora-rlhf-push-") as name:
        files = stage_adapter(record, role, repo_id, Path(name))
        hub.check_access()
        base_is_private = hub.visibility(base)
        if base_is_private is None:
            raise _no_base(base, f"push it first: `lora-rlhf push {record.folder} --base {base}`")
        result = hub.upload(Path(name), files, f"{role} adapter of {record.data.get('name')}")
    entry = {role: {"repo_id": repo_id, "commit": result["commit"]}}
    record.data["clock"]["pushed"] = record.data["clock"].get("pushed", {}) | entry
    record.save()
    if base_is_private and not result["private"]:
        result["notes"].append(f"{base} is private: others cannot load this adapter")
    return result


def push_base(
    record: Record, repo_id: str, *, public: bool = False, token: str | None = None
) -> dict[str, Any]:
    """Publish the run's base, packaged or a local folder, as a repository of its own.

    The record then names it (`model.hub_id`), so that adapters pushed later refer to it.

    Returns:
        The same as `push`.

    Raises:
        HubError: As `push`.
    """
    again = f"lora-rlhf push {shlex.quote(str(record.folder))} --base {repo_id}"
    hub = Repository(repo_id, token, public, again, "the push of the base model")
    with tempfile.TemporaryDirectory(prefix="lora-rlhf-push-") as name:
        files = stage_base(record, Path(name))
        hub.check_access()
        result = hub.upload(Path(name), files, f"base model of {record.data.get('name')}")
    record.data.setdefault("model", {}).update(
        {"hub_id": repo_id, "hub_revision": result["commit"]}
    )
    record.save()
    return result


def offline() -> bool:
    """Whether the network is off by choice (HF_HUB_OFFLINE=1)."""
    return bool(constants.is_offline_mode())


def base_licence(model: dict[str, Any], token: str | None = None) -> str | None:
    """The licence that the Hub's own card of a base names; None where nobody can be asked.

    Args:
        model: `id` and `revision`, as in the record.
    """
    if offline():
        return None
    try:
        ask, revision = HfApi(token=token).model_info, model.get("revision")
        info = ask(str(model["id"]), revision=revision, timeout=_LICENCE_SECONDS)
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, _TRANSPORT, OSError):
        return None  # it is only for the card, which then says that it does not know
    card: Any = info.card_data or {}
    named = card.get("license")
    named = card.get("license_name") or named if named == "other" else named
    return named if isinstance(named, str) else None


def preflight(recipe: Recipe, record: Record | None = None, token: str | None = None) -> list[str]:
    """Find out before training whether the recipe's `hub:` section can be done after it.

    Args:
        record: The run that is gone on with: what it has pushed is done, and a base that
            `push --base` published has its id there.

    Returns:
        Notes for the user; empty where all is well or there is nothing to push. Without a network
        by choice (HF_HUB_OFFLINE=1) training may go on, and the note says what is skipped.

    Raises:
        HubError: No token, one that may not write there, a repository id or a base that cannot be.
    """
    wanted = to_push(recipe, record)
    if not wanted:
        return []
    listed = ", ".join(f"{role} to {repo}" for role, repo in wanted.items())
    if offline():
        return [f"offline (HF_HUB_OFFLINE): not pushed: {listed}; push after the run instead"]
    source = "the packaged tiny model" if recipe.model.id == "tiny" else "Hub"
    known = record.data["model"].get("hub_id") if record is not None else None
    model = {"id": recipe.model.id, "hub_id": recipe.model.hub_id or known, "source": source}
    base, notes = hub_base(model), []
    if base is None:
        raise local_base(recipe.model.id)
    for role, repo_id in wanted.items():
        what = f"the push of the {role} adapter"
        hub = Repository(repo_id, token, recipe.hub.public, "lora-rlhf run", what)
        hub.check_access()
        if hub.visibility(base) is None:
            raise _no_base(base, "push the base first, or correct model.hub_id")
        notes += hub.check_visibility()
    return notes


class Repository:
    """One repository and what is wanted of it; every call is tried again, within bounds.

    Args:
        again: The command that tries again, for messages.
        what: What is done with it, for messages.
        pauses: Seconds before each new try of a step that failed in passing.
    """

    def __init__(
        self,
        repo_id: str,
        token: str | None,
        public: bool,
        again: str,
        what: str,
        pauses: tuple[float, ...] = PAUSES,
    ) -> None:
        self.repo_id, self.public, self.what, self.pauses = repo_id, public, what, pauses
        self.head: str | None = None  # the commit that a mirror builds on
        self.again = again + (" --public" if public and again != "lora-rlhf run" else "")
        try:
            validate_repo_id(repo_id)
            if repo_id.count("/") != 1:
                raise HFValidationError("it names no organisation or user")
        except HFValidationError as error:
            raise HubError(
                f"the repository id {repo_id!r}: {error}",
                expected="organisation/name",
                remedy="letters, digits, - _ and . only, and one slash",
            ) from None
        if offline():
            raise HubError(
                f"offline (HF_HUB_OFFLINE): {what} to {repo_id} is skipped",
                remedy=f"with a network, and HF_HUB_OFFLINE unset: `{self.again}`",
            )
        self.token = token or get_token()
        if not self.token:
            raise HubError(
                f"there is no token for {what} to {repo_id}",
                expected="a token that may write, from `hf auth login` or HF_TOKEN",
                remedy=f"log in with `hf auth login`, then `{self.again}`",
            )
        _limit_silence()
        self.api = HfApi(token=self.token)

    def check_access(self) -> None:
        """Whether the token may write to the namespace of the repository.

        Raises:
            HubError: It may not, or is not valid.
        """
        me = self.call(self.api.whoami)
        namespace = self.repo_id.split("/")[0]
        orgs = {org["name"]: org.get("roleInOrg") for org in me.get("orgs", [])}
        if namespace != me.get("name") and namespace not in orgs:
            raise self._refused(
                f"{me.get('name')} is no member of {namespace}",
                f"a repository under {', '.join([str(me.get('name')), *orgs])}",
            )
        access = (me.get("auth") or {}).get("accessToken") or {}
        if orgs.get(namespace) == "read" or access.get("role") == "read":
            raise self._refused(f"the token may only read in {namespace}", "one that may write")
        if access.get("role") == "fineGrained":
            scopes = (access.get("fineGrained") or {}).get("scoped") or []
            names = {
                (scope.get("entity") or {}).get("name")
                for scope in scopes
                if "repo.write" in (scope.get("permissions") or [])
            }
            if not names & {namespace, self.repo_id}:
                given = f"the fine-grained token may not write in {namespace}"
                raise self._refused(given, "one with write access to its repositories")

    def info(self, repo_id: str) -> ModelInfo | None:
        """What the Hub says of a repository; None where there is none that the token may see."""
        try:
            return self.call(lambda: self.api.model_info(repo_id), missing=True)
        except RepositoryNotFoundError:
            return None

    def visibility(self, repo_id: str) -> bool | None:
        """Whether a repository is private; None where there is none that the token may see."""
        return bool(found.private) if (found := self.info(repo_id)) else None

    def check_visibility(self) -> list[str]:
        """Refuse to publish what should be private; say so where `public` cannot be had.

        Raises:
            HubError: The repository is there and public, but the push is a private one.
        """
        private = self.visibility(self.repo_id)
        if private is False and not self.public:
            raise HubError(
                f"{self.repo_id} is a public repository, and {self.what} is meant to be private",
                expected="a private repository, or the wish to publish",
                remedy=f"`{self.again} --public`, or hub.public in the recipe, or another one",
            )
        if private and self.public:
            return [f"{self.repo_id} is private and stays so; change it in its settings"]
        return []

    def upload(self, folder: Path, files: list[str], message: str) -> dict[str, Any]:
        """Make the repository where there is none, and commit all files at once.

        Not `upload_folder`: that one may split a push into several commits, and between two of
        them the repository would hold an adapter without its card.
        """
        notes = self.check_visibility()
        private, make = not self.public, self.api.create_repo
        self.call(lambda: make(self.repo_id, private=private, exist_ok=True))
        commit = self.call(
            lambda: self.api.create_commit(
                self.repo_id,
                # New operations for every try: those of a failed one must not be used again.
                [CommitOperationAdd(name, folder / name) for name in files],
                commit_message=f"Push the {message}",
            )
        )
        return {
            "url": f"{self.api.endpoint}/{self.repo_id}",
            "commit": commit.oid,
            "files": files,
            "private": self.visibility(self.repo_id),
            "notes": notes,
        }

    def mirror(
        self, folder: Path, files: list[str], message: str, allowed: Callable[[str], None]
    ) -> str:
        """Let a private repository hold these files and no others, in one commit; returns it.

        `allowed` is asked before every try, and raises where this commit may not be built on.
        """
        self.call(lambda: self.api.create_repo(self.repo_id, private=True, exist_ok=True))

        def commit() -> str:
            # Asked in every try: the one before may have been heard though its answer was lost.
            there = self.api.model_info(self.repo_id)
            allowed(str(there.sha))
            gone = {f.rfilename for f in there.siblings or ()} - {*files, ".gitattributes"}
            return self.api.create_commit(
                self.repo_id,
                [
                    *(CommitOperationAdd(name, folder / name) for name in files),
                    *(CommitOperationDelete(name) for name in sorted(gone)),
                ],
                commit_message=message,
                parent_commit=there.sha,
            ).oid

        return self.call(commit)

    def download(self, folder: Path, only: str | None = None, commit: str | None = None) -> bool:
        """All files, or one, of a commit, or the newest, into a folder; False: no repository."""
        options: dict[str, Any] = {"local_dir": folder, "allow_patterns": only, "revision": commit}
        try:
            self.call(lambda: self.api.snapshot_download(self.repo_id, **options), missing=True)
        except RepositoryNotFoundError:
            return False
        return True

    def call(self, step: Callable[[], T], missing: bool = False) -> T:
        """Run one step, again where the fault may pass; `missing` lets "not found" through."""
        for pause in (*self.pauses, None):
            try:
                return _heard(step)
            except OfflineModeIsEnabled as error:
                raise self._failed(error) from None
            except HfHubHTTPError as error:
                if missing and isinstance(error, RepositoryNotFoundError):
                    raise
                response = getattr(error, "response", None)
                status = getattr(response, "status_code", None)
                if status not in _PASSING or pause is None:
                    raise self._failed(error, status) from None
                pause = _asked_pause(response, pause)
            except (_TRANSPORT, OSError) as error:
                # The client says "not in the cache" where it could not ask the Hub.
                ours = isinstance(error, FileNotFoundError)
                if pause is None or (ours and not isinstance(error, LocalEntryNotFoundError)):
                    raise self._failed(error) from None
            except (ValueError, RuntimeError) as error:  # on a card that the Hub would refuse
                raise self._failed(error) from None
            interrupts.sleep(pause)
        raise AssertionError("the last try returns or raises")

    def _failed(self, error: Exception, status: int | None = None) -> HubError:
        remedy = f"nothing that was trained is lost; try again with `{self.again}`"
        if status in (401, 403):
            remedy = f"use a token that may write there (`hf auth login`), then `{self.again}`"
        text = " ".join(str(error).replace(str(self.token), "***").split()) or type(error).__name__
        code = f" (HTTP {status})" if status else ""
        return HubError(f"{self.what} to {self.repo_id} failed{code}: {text:.300}", remedy=remedy)

    def _refused(self, given: str, expected: str) -> HubError:
        return HubError(
            f"{self.what} to {self.repo_id}: {given}",
            expected=expected,
            remedy=f"choose another repository or token (`hf auth login`), then `{self.again}`",
        )


def _no_base(base: str, remedy: str) -> HubError:
    return HubError(
        f"the base {base} is not on the Hub, or the token may not see it",
        expected="a base that others can load the adapter with",
        remedy=remedy,
    )


def _heard(step: Callable[[], T]) -> T:
    """The client hides what the upload of a large file failed of behind a RuntimeError."""
    try:
        return step()
    except RuntimeError as error:
        raise error.__cause__ or error from None


@functools.cache
def _limit_silence() -> None:
    """Let no session of the client, which makes new ones as it likes, wait for ever."""
    before = _http._GLOBAL_CLIENT_FACTORY

    def impatient() -> Any:
        session = before()
        session.timeout = _SILENCE_SECONDS
        return session

    set_client_factory(impatient)


def _asked_pause(response: Any, pause: float) -> float:
    """The Hub's own Retry-After, within reason."""
    asked = str(response.headers.get("retry-after", "")) if response is not None else ""
    return min(float(asked), _LONGEST_PAUSE) if asked.isdigit() else pause
