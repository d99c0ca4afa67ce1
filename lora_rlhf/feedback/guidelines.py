# SPDX-License-Identifier: Apache-2.0
"""Guidelines for labelers: a Markdown file, whose version is its sha256."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from lora_rlhf.errors import UsageError, reason

PACKAGED = Path(__file__).with_name("guidelines.md")
"""Our own text, as a starting point."""

LARGEST = 500_000
"""Bytes."""


@dataclass(frozen=True)
class Guidelines:
    """One version of the guidelines."""

    text: str

    @property
    def sha256(self) -> str:
        """The version, which each label holds."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def read(path: Path) -> Guidelines:
    """Read the guidelines of a project.

    Raises:
        UsageError: The file is missing, empty, not UTF-8 or no text of a few pages.
    """
    problem = ""
    try:
        if path.stat().st_size > LARGEST:
            problem = f"the guidelines have over {LARGEST} bytes"
        elif (text := path.read_bytes().decode("utf-8-sig")).strip():
            return Guidelines(text)
        else:
            problem = "the guidelines are empty"
    except (OSError, UnicodeDecodeError) as error:
        problem = f"the guidelines cannot be read: {reason(error)}"
    raise UsageError(
        problem,
        where=str(path),
        expected="a Markdown file with a few pages for the labelers",
        remedy=f"write it, restore it, or start from a copy of {PACKAGED}",
    )
