# SPDX-License-Identifier: Apache-2.0
"""One repository on the Hub: access checks, upload, mirror and download, with retries.

The only module that talks to the Hub.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    DatasetInfo,
    HfApi,
    ModelInfo,
    constants,
    get_token,
    hf_hub_download,
    set_client_factory,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import _http, validate_repo_id  # type: ignore[attr-defined]

from lora_rlhf.errors import HubError, first_line
from lora_rlhf.runtime import interrupts

PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before each retry, unless the Hub says how long to wait."""
_LONGEST_PAUSE = 60.0
_LICENCE_SECONDS = 10.0
_SILENCE_SECONDS = 60.0  # huggingface_hub sets no timeout: a dead connection would block for good
# 409, 412: somebody else committed meanwhile; a retry builds on that commit, if allowed.
_TRANSIENT = frozenset({408, 409, 412, 425, 429, 500, 502, 503, 504})
_NONSENSE = (AttributeError, LookupError, TypeError)
"""What huggingface_hub raises for an answer that is not one of the Hub."""
# The base class of connection errors and time-outs, whichever HTTP library huggingface_hub uses.
_TRANSPORT: type[Exception] = HfHubHTTPError.__mro__[1]


def offline() -> bool:
    """Return whether the network is turned off (HF_HUB_OFFLINE=1)."""
    return bool(constants.is_offline_mode())


def base_licence(model: dict[str, Any], token: str | None = None) -> str | None:
    """Read the licence of the record's `model` from its card on the Hub; None if out of reach."""
    if offline():
        return None
    try:
        info = HfApi(token=token).model_info(
            str(model["id"]), revision=model.get("revision"), timeout=_LICENCE_SECONDS
        )
        card: Any = info.card_data or {}
        licence = card.get("license")
        licence = card.get("license_name") or licence if licence == "other" else licence
    except (*_NONSENSE, _TRANSPORT, OSError, ValueError):
        return None  # only the card needs it, and can say "not recorded"
    return licence if isinstance(licence, str) else None


def adapter_folder(repo_id: str) -> Path | None:
    """Return the local copy of a Hub repository's adapter; None if it holds none.

    Without a network the Hub's cache is read.

    Raises:
        HubError: The repository cannot be read.
    """
    try:
        config = hf_hub_download(repo_id, "adapter_config.json")
        hf_hub_download(repo_id, "adapter_model.safetensors")
        for name in ("check.json", "reward.json"):  # adapters of this package have them
            with contextlib.suppress(EntryNotFoundError, LocalEntryNotFoundError):
                hf_hub_download(repo_id, name)
    except (EntryNotFoundError, LocalEntryNotFoundError):
        return None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise HubError(
            f"{repo_id} cannot be read: {first_line(error)}",
            expected="a model or an adapter on the Hub, or in its cache",
            remedy="check the id, and run `hf auth login` for a private one",
        ) from None
    return Path(config).parent


def snapshot(repo_id: str, folder: Path, names: Sequence[str], revision: str | None) -> str:
    """Download the named files of a repository into a folder; return the commit.

    Raises:
        HubError: The repository cannot be read.
    """
    try:
        validate_repo_id(repo_id)
        commit = HfApi().model_info(repo_id, revision=revision).sha
        snapshot_download(repo_id, revision=commit, local_dir=folder, allow_patterns=list(names))
    except (*_NONSENSE, _TRANSPORT, OSError, ValueError) as error:
        raise HubError(
            f"{repo_id} cannot be read: {first_line(error)}",
            expected="an adapter on the Hub that your token may see",
            remedy="check the id and the network, and run `hf auth login` for a private one",
        ) from None
    return str(commit)


class Repository:
    """One repository, opened for one operation; transient errors are retried.

    Args:
        again: The command that repeats the whole operation, for messages.
        operation: For messages: "the push of the policy adapter".
        pauses: Seconds before each retry of a step.
        kind: A dataset has only `check_access` and `upload`.
    """

    def __init__(
        self,
        repo_id: str,
        token: str | None,
        public: bool,
        again: str,
        operation: str,
        pauses: tuple[float, ...] = PAUSES,
        kind: Literal["model", "dataset"] = "model",
    ) -> None:
        self.kind = kind
        self.repo_id, self.public, self.operation, self.pauses = repo_id, public, operation, pauses
        self.head: str | None = None  # the commit that a mirror builds on
        self.again = again + (" --public" if public and again != "lora-rlhf run" else "")
        try:
            validate_repo_id(repo_id)
            if repo_id.count("/") != 1:
                raise HFValidationError("it names no organisation or user")
        except HFValidationError as error:
            raise HubError(
                f"{repo_id!r} is not a repository id: {error}",
                expected="organisation/name",
                remedy="use letters, digits, - _ and . only, and one slash",
            ) from None
        if offline():
            raise HubError(
                f"offline (HF_HUB_OFFLINE): {operation} to {repo_id} is skipped",
                remedy=f"with a network, unset HF_HUB_OFFLINE and run `{self.again}`",
            )
        self.token = token or get_token()
        if not self.token:
            raise HubError(
                f"no token for {operation} to {repo_id}",
                expected="a token with write access, from `hf auth login` or HF_TOKEN",
                remedy=f"log in with `hf auth login`, then run `{self.again}`",
            )
        _limit_silence()
        self.api = HfApi(token=self.token)

    def check_access(self) -> None:
        """Check that the token may write to the repository's namespace.

        Raises:
            HubError: The token is not valid, or lacks write access.
        """
        self.call(self._check_access)

    def _check_access(self) -> None:
        me = self.api.whoami()
        namespace = self.repo_id.split("/")[0]
        orgs = {org["name"]: org.get("roleInOrg") for org in me.get("orgs", [])}
        if namespace != me.get("name") and namespace not in orgs:
            raise self._no_access(
                f"{me.get('name')} is not a member of {namespace}",
                f"a repository under {', '.join([str(me.get('name')), *orgs])}",
            )
        access = (me.get("auth") or {}).get("accessToken") or {}
        if orgs.get(namespace) == "read" or access.get("role") == "read":
            raise self._no_access(
                f"the token has only read access to {namespace}", "a token with write access"
            )
        if access.get("role") == "fineGrained":
            scopes = (access.get("fineGrained") or {}).get("scoped") or []
            writable = {
                (scope.get("entity") or {}).get("name")
                for scope in scopes
                if "repo.write" in (scope.get("permissions") or [])
            }
            if not writable & {namespace, self.repo_id}:
                raise self._no_access(
                    f"the fine-grained token has no write access to {namespace}",
                    "a token with write access to its repositories",
                )

    def info(self, repo_id: str) -> ModelInfo | DatasetInfo | None:
        """Look up a repository; None if it does not exist or the token may not see it."""
        look_up = self.api.dataset_info if self.kind == "dataset" else self.api.model_info
        info: ModelInfo | DatasetInfo | None = self.call(lambda: look_up(repo_id), missing_ok=True)
        return info

    def check_visibility(self) -> list[str]:
        """Refuse a private push to a public repository; return a note if `public` has no effect.

        Raises:
            HubError: The repository exists and is public, but the push is private.
        """
        info = self.info(self.repo_id)
        if info and not info.private and not self.public:
            raise HubError(
                f"{self.repo_id} is a public repository, "
                f"and {self.operation} is meant to be private",
                expected="a private repository, or permission to publish",
                remedy=f"`{self.again} --public`, hub.public in the recipe, or another repository",
            )
        if info and info.private and self.public:
            return [f"{self.repo_id} is private and stays so; change it in its settings"]
        return []

    def upload(self, folder: Path, files: list[str], message: str) -> dict[str, Any]:
        """Create the repository if needed, and commit all files at once.

        `upload_folder` is not used: it may split a push into several commits, and between two of
        them the repository would hold an adapter without its card.
        """
        notes = self.check_visibility()
        about: dict[str, Any] = {"private": not self.public, "repo_type": self.kind}
        self.call(lambda: self.api.create_repo(self.repo_id, exist_ok=True, **about))
        commit = self.call(
            lambda: self.api.create_commit(
                self.repo_id,
                # Made anew in every try: operations of a failed commit must not be used again.
                [CommitOperationAdd(name, folder / name) for name in files],
                commit_message=f"Push the {message}",
                repo_type=self.kind,
            )
        )
        info = self.info(self.repo_id)
        return {
            "url": f"{self.api.endpoint}/{'datasets/' * (self.kind == 'dataset')}{self.repo_id}",
            "commit": commit.oid,
            "files": files,
            "private": info and bool(info.private),
            "notes": notes,
        }

    def collect(self, title: str, items: Mapping[str, Literal["model", "dataset"]]) -> str:
        """Put repositories (id -> model or dataset) into the collection of this title; its URL."""
        namespace = self.repo_id.split("/")[0]
        made: dict[str, Any] = {"private": not self.public, "exists_ok": True}
        collection = self.call(
            lambda: self.api.create_collection(title, namespace=namespace, **made)
        )
        for repo_id, kind in items.items():
            add = functools.partial(
                self.api.add_collection_item, collection.slug, repo_id, kind, exists_ok=True
            )
            self.call(add)
        return f"{self.api.endpoint}/collections/{collection.slug}"

    def mirror(
        self, folder: Path, files: list[str], message: str, check_parent: Callable[[str], None]
    ) -> str:
        """Make a private repository hold exactly these files, in one commit; return its id.

        Args:
            check_parent: Called with the parent commit before every try; may raise.
        """
        self.call(lambda: self.api.create_repo(self.repo_id, private=True, exist_ok=True))

        def commit() -> str:
            # Looked up in every try: an earlier try may have succeeded and its answer been lost.
            head = self.api.model_info(self.repo_id)
            check_parent(str(head.sha))
            gone = {f.rfilename for f in head.siblings or ()} - {*files, ".gitattributes"}
            return self.api.create_commit(
                self.repo_id,
                [
                    *(CommitOperationAdd(name, folder / name) for name in files),
                    *(CommitOperationDelete(name) for name in sorted(gone)),
                ],
                commit_message=message,
                parent_commit=head.sha,
            ).oid

        oid: str = self.call(commit)
        return oid

    def squash(self, message: str, titles: set[str], check_parent: Callable[[str], None]) -> None:
        """Make the newest commit the only one, so that the Hub can drop what earlier ones hold.

        Args:
            titles: Those of the commits that may go; with any other commit nothing is done.
            check_parent: Called with the newest commit before every try; may raise.
        """

        def squash() -> None:
            commits = self.api.list_repo_commits(self.repo_id)
            check_parent(commits[0].commit_id)
            if others := {commit.title for commit in commits} - titles - {"initial commit"}:
                raise HubError(f"the run did not make the commit {min(others)!r:.80}")
            self.api.super_squash_history(self.repo_id, commit_message=message)

        self.call(squash)

    def download(self, folder: Path, only: str | None = None, commit: str | None = None) -> None:
        """Download all files, or one, of a commit (the newest), if the repository exists."""
        options: dict[str, Any] = {"local_dir": folder, "allow_patterns": only, "revision": commit}
        self.call(lambda: self.api.snapshot_download(self.repo_id, **options), missing_ok=True)

    def call(self, step: Callable[[], Any], *, missing_ok: bool = False) -> Any:
        """Run one step, and retry it while its error may be transient.

        Args:
            missing_ok: Return None if the repository does not exist.

        Raises:
            HubError: The error is permanent, or outlasted all retries.
        """
        pauses = iter(self.pauses)
        while True:
            try:
                return step()
            except (_TRANSPORT, OSError, ValueError, RuntimeError) as raised:
                error: Exception = raised
                if isinstance(raised, RuntimeError) and isinstance(raised.__cause__, Exception):
                    error = raised.__cause__  # why the upload of a large file failed
                if missing_ok and isinstance(error, RepositoryNotFoundError):
                    return None
                pause = next(pauses, None) if _is_transient(error) else None
                if pause is None:
                    raise self._failed(error) from None
                pause = _retry_after(error, pause)
            except _NONSENSE as error:
                raise HubError(
                    f"{self.operation} to {self.repo_id} failed: the answer of "
                    f"{self.api.endpoint:.80} is not one of the Hub ({error!r:.120})",
                    expected="the Hub, or a mirror of it",
                    remedy="check HF_ENDPOINT and the network's proxy, then run "
                    f"`{self.again}` again",
                ) from error
            interrupts.sleep(pause)

    def _failed(self, error: Exception) -> HubError:
        status = _status(error)
        remedy = f"nothing that was trained is lost; try again with `{self.again}`"
        if status in (401, 403):
            remedy = f"use a token with write access (`hf auth login`), then run `{self.again}`"
        text = " ".join(str(error).replace(str(self.token), "***").split()) or type(error).__name__
        code = f" (HTTP {status})" if status else ""
        return HubError(
            f"{self.operation} to {self.repo_id} failed{code}: {text:.300}", remedy=remedy
        )

    def _no_access(self, given: str, expected: str) -> HubError:
        return HubError(
            f"{self.operation} to {self.repo_id}: {given}",
            expected=expected,
            remedy=f"use another repository or token (`hf auth login`), then run `{self.again}`",
        )


def _status(error: Exception) -> int | None:
    if not isinstance(error, HfHubHTTPError):
        return None
    return getattr(error.response, "status_code", None)


def _is_transient(error: Exception) -> bool:
    if isinstance(error, HfHubHTTPError):
        return _status(error) in _TRANSIENT
    if isinstance(error, FileNotFoundError):
        # huggingface_hub says "not in the cache" when it could not reach the Hub.
        return isinstance(error, LocalEntryNotFoundError)
    return isinstance(error, _TRANSPORT | OSError) and not isinstance(error, OfflineModeIsEnabled)


def _retry_after(error: Exception, pause: float) -> float:
    response = getattr(error, "response", None)
    seconds = str(response.headers.get("retry-after", "")) if response is not None else ""
    return min(float(seconds), _LONGEST_PAUSE) if seconds.isdigit() else pause


@functools.cache
def _limit_silence() -> None:
    """Set a timeout on every HTTP client that huggingface_hub creates from now on."""
    factory = _http._GLOBAL_CLIENT_FACTORY

    def with_timeout() -> Any:
        client = factory()
        client.timeout = _SILENCE_SECONDS
        return client

    set_client_factory(with_timeout)
