# SPDX-License-Identifier: Apache-2.0
"""Damage done to files."""

from pathlib import Path


def flip_bit(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
