# SPDX-License-Identifier: Apache-2.0
"""Publish adapters and bases: one repository and one commit each, private by default.

All checks come before the first byte is sent. A failed push leaves the run as it was, and can be
repeated: files that are on the Hub already are not sent again.
"""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lora_rlhf.errors import HubError, UsageError
from lora_rlhf.recipe.schema import Recipe
from lora_rlhf.reports.cards.card_facts import ROLES, hub_base
from lora_rlhf.runs import run_lock
from lora_rlhf.runs.record import Record

from .repository import Repository, base_licence, offline
from .staging import check_adapter, local_base, stage_adapter, stage_base


def push(
    record: Record,
    role: str,
    repo_id: str,
    *,
    public: bool = False,
    report: bool = False,
    token: str | None = None,
) -> dict[str, Any]:
    """Publish the adapter of `role` with its card, in one commit.

    Args:
        record: A finished run.
        role: policy, reward, value or sft.
        repo_id: organisation/name; the repository is created if there is none.
        public: Whether a new repository is public; an existing one keeps its visibility.
        report: Add the evaluation's report.json and report.html, which hold prompts and answers.
        token: By default the token of `hf auth login` or HF_TOKEN.

    Returns:
        `url`, `commit`, `files`, `private`, and `notes` for the user.

    Raises:
        UsageError: There is no such role.
        HubError: A check failed before anything was sent, or the Hub could not be reached; the
            message holds the command that tries again.
    """
    with run_lock.locked(record.folder):
        record.refresh()  # the caller may have read it before the run went on
        return _push(record, role, repo_id, public, token, report)


def _push(
    record: Record, role: str, repo_id: str, public: bool, token: str | None, report: bool
) -> dict[str, Any]:
    """Publish an adapter of a run that is locked."""
    again = f"lora-rlhf push {shlex.quote(str(record.folder))} --{role} {repo_id}"
    hub = Repository(repo_id, token, public, again, f"the push of the {role} adapter")
    base, model = check_adapter(record, role), record.data["model"]
    if model.get("source") == "Hub" and not model.get("license"):  # trained without a network
        model["license"] = base_licence(model, token)
        record.save()
    with tempfile.TemporaryDirectory(prefix="lora-rlhf-push-") as name:
        files = stage_adapter(record, role, repo_id, Path(name), report=report)
        hub.check_access()
        base_info = hub.info(base)
        if base_info is None:
            raise _no_base(
                base,
                f"push it first: `lora-rlhf push {shlex.quote(str(record.folder))} --base {base}`",
            )
        result = hub.upload(Path(name), files, f"{role} adapter of {record.data.get('name')}")
    entry = {role: {"repo_id": repo_id, "commit": result["commit"]}}
    record.data["clock"]["pushed"] = record.data["clock"].get("pushed", {}) | entry
    record.save()
    if base_info.private and not result["private"]:
        result["notes"].append(f"{base} is private: others cannot load this adapter")
    return result


def push_base(record: Record, repo_id: str, *, public: bool = False) -> dict[str, Any]:
    """Publish the run's base, packaged or a local folder, as a repository of its own.

    The record then names the repository (`model.hub_id`), and adapters pushed later refer to it.
    Returns and raises the same as `push`.
    """
    again = f"lora-rlhf push {shlex.quote(str(record.folder))} --base {repo_id}"
    hub = Repository(repo_id, None, public, again, "the push of the base model")
    with (
        run_lock.locked(record.folder),
        tempfile.TemporaryDirectory(prefix="lora-rlhf-push-") as name,
    ):
        record.refresh()
        files = stage_base(record, Path(name))
        hub.check_access()
        result = hub.upload(Path(name), files, f"base model of {record.data.get('name')}")
        published = {"hub_id": repo_id, "hub_revision": result["commit"]}
        record.data.setdefault("model", {}).update(published)
        record.save()
    return result


def collect(record: Record, title: str, repo_ids: Sequence[str], *, public: bool = False) -> str:
    """Put pushed adapters, and datasets as `datasets/org/name`, into one collection; its URL."""
    again = f"lora-rlhf push {shlex.quote(str(record.folder))} --collection {shlex.quote(title)}"
    models = [repo_id for repo_id in repo_ids if not repo_id.startswith("datasets/")]
    hub = Repository(models[0], None, public, again, f"the collection {title}")
    kinds: dict[str, Literal["model", "dataset"]] = {
        repo_id.removeprefix("datasets/"): "model" if repo_id in models else "dataset"
        for repo_id in repo_ids
    }
    return hub.collect(title, kinds)


def push_targets(
    record: Record, named: dict[str, str | None], *, public: bool, base: str | None
) -> tuple[dict[str, str], bool]:
    """Map role to repository for a push, from the options or else the recipe; also return `public`.

    Raises:
        UsageError: Neither names a repository.
    """
    targets = {role: repo_id for role, repo_id in named.items() if repo_id}
    if targets or base:
        return targets, public
    section = record.recipe().hub
    targets = {role: getattr(section, role) for role in named if getattr(section, role)}
    if not targets:
        raise UsageError(
            "no repository to push to",
            expected="--policy, --reward, --value, --sft or --base, each with org/name",
            remedy=f"lora-rlhf push {shlex.quote(str(record.folder))} --policy org/name",
        )
    return targets, public or section.public


def pending_pushes(recipe: Recipe, record: Record | None) -> dict[str, str]:
    """Map role to repository for the pushes that `hub:` asks for and that are not done."""
    done = record.data["clock"].get("pushed", {}) if record is not None else {}
    targets = {role: getattr(recipe.hub, role) for role in ROLES}
    return {
        role: repo_id
        for role, repo_id in targets.items()
        if repo_id and done.get(role, {}).get("repo_id") != repo_id
    }


def check_pushes(recipe: Recipe, record: Record | None = None) -> list[str]:
    """Check before training that the pushes of the recipe's `hub:` section can be made after it.

    Args:
        record: The run to continue, with its earlier pushes and the Hub id of its base.

    Returns:
        Notes for the user; empty if there is nothing to push. With HF_HUB_OFFLINE=1 training may
        start, and the note lists the skipped pushes.

    Raises:
        HubError: No token, no write access, a bad repository id, or a base that others cannot load.
    """
    targets = pending_pushes(recipe, record)
    if not targets:
        return []
    if offline():
        listed = ", ".join(f"{role} to {repo_id}" for role, repo_id in targets.items())
        return [f"offline (HF_HUB_OFFLINE): not pushed: {listed}; push after the run instead"]
    known = record.data["model"].get("hub_id") if record is not None else None
    source = "the packaged tiny model" if recipe.model.id == "tiny" else "Hub"
    base = hub_base(
        {"id": recipe.model.id, "hub_id": recipe.model.hub_id or known, "source": source}
    )
    if base is None:
        raise local_base(recipe.model.id)
    notes = []
    for role, repo_id in targets.items():
        what = f"the push of the {role} adapter"
        hub = Repository(repo_id, None, recipe.hub.public, "lora-rlhf run", what)
        hub.check_access()
        if hub.info(base) is None:
            raise _no_base(base, "push the base first, or correct model.hub_id")
        notes += hub.check_visibility()
    return notes


def _no_base(base: str, remedy: str) -> HubError:
    return HubError(
        f"the base {base} is not on the Hub, or the token may not see it",
        expected="a base that others can load the adapter with",
        remedy=remedy,
    )
