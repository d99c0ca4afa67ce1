# SPDX-License-Identifier: Apache-2.0
"""Prompt sets: rows with a prompt and what metrics compare the answer with."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One prompt; `reference` holds what the metrics need to judge an answer."""

    id: str
    kind: str  # kind of prompt, "" if the set has none
    prompt: str | list[dict[str, str]]  # text, or turns of which the last is the user's
    reference: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PromptSet:
    """The rows that every target answers, and what people should know of their source."""

    name: str
    rows: list[Row]
    source: str  # file or Hub id
    licence: str
    sha256: str  # of the rows


def _sha256(rows: list[Row]) -> str:
    lines = (json.dumps(asdict(row), sort_keys=True) + "\n" for row in rows)
    return hashlib.sha256("".join(lines).encode()).hexdigest()
