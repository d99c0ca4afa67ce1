# SPDX-License-Identifier: Apache-2.0
"""Answers on disk: JSON with the sha256 of its content and the identity of what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lora_rlhf.runs.disk import write_atomically

from .answers import digest


def take(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Return what an earlier process kept, if it is whole and of the same evaluation; else {}."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["sha256"] == digest([content["identity"], content["kept"]]) and content[
            "identity"
        ] == json.loads(json.dumps(identity)):
            kept: dict[str, Any] = content["kept"]
            return kept
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return {}


def put(path: Path, identity: dict[str, Any], kept: dict[str, Any]) -> None:
    """Keep JSON content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sha256 = digest([identity, kept])
    write_atomically(path, json.dumps({"sha256": sha256, "identity": identity, "kept": kept}))
