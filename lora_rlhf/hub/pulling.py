# SPDX-License-Identifier: Apache-2.0
"""Adapters from the Hub as folders that `chat`, `evaluate` and `serve` take."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_rlhf.errors import HubError, UsageError
from lora_rlhf.runs.disk import sha256

from . import repository
from .staging import ADAPTER

RECORD = "record_of_the_run.json"
"""Name of the run's record in a pulled folder, which is no run."""

_FILES = (*ADAPTER, "README.md", "recipe.yaml", "record.json", "plots/*.png")


@dataclass(frozen=True)
class Pulled:
    """An adapter's folder, its base and commit, and whether its files are those of its record."""

    folder: Path
    base: str
    commit: str
    verified: bool


def pull(repo_id: str, out: str | Path | None = None, *, revision: str | None = None) -> Pulled:
    """Download an adapter, and check its files against the sha256 of its published record.

    Args:
        out: Folder to make; default: the repository's name under `adapters/`.
        revision: Commit, branch or tag; default: the newest.

    Raises:
        UsageError: The folder exists already.
        HubError: There is no such adapter, or a file is not as its record says.
    """
    folder = Path("adapters") / repo_id.rpartition("/")[2] if out is None else Path(out)
    if folder.exists():
        raise UsageError(f"{folder} exists", remedy="give another --out, or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".pull-", dir=folder.parent) as name:
        there = Path(name) / "adapter"
        commit = repository.snapshot(repo_id, there, _FILES, revision)
        config = _json(there / "adapter_config.json", repo_id)
        if config is None or not (there / "adapter_model.safetensors").is_file():
            raise HubError(
                f"{repo_id} holds no adapter",
                expected="adapter_config.json and adapter_model.safetensors",
                remedy="name a repository of `lora-rlhf push`, or any LoRA saved by PEFT",
            )
        published: dict[str, str] = {}
        if (record := _json(there / "record.json", repo_id)) is not None:
            listed = record.get("published")
            published = listed if isinstance(listed, dict) else {}
            (there / "record.json").rename(there / RECORD)
        for path, digest in published.items():
            if path in ADAPTER and (there / path).is_file() and sha256(there / path) != digest:
                raise HubError(
                    f"{path} of {repo_id} is not what its record says",
                    expected=f"sha256 {digest}",
                    remedy="somebody changed it after the push: ask its author",
                )
        there.rename(folder)
    base = str(config.get("base_model_name_or_path") or "")
    return Pulled(folder, base, commit, "adapter_model.safetensors" in published)


def _json(path: Path, repo_id: str) -> dict[str, Any] | None:
    """Read a JSON object; None if there is no file."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
    except ValueError:
        pass
    raise HubError(f"{path.name} of {repo_id} is not a JSON object")
