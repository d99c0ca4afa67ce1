# SPDX-License-Identifier: Apache-2.0
"""Damage done to files, and edits that a run cannot tell from its own writing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_rlhf.runs.disk import signed


def flip_bit(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a record or a manifest, and sign it again."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(signed(data)))
