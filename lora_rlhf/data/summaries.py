# SPDX-License-Identifier: Apache-2.0
"""Lines that a run prints of a set: layout, rows, losses, and one row as the model sees it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .sources import excerpt
from .tokenization import completion_ids, prompt_ids

_WIDTH = 160


def lines(name: str, report: dict[str, Any], row: Mapping[str, Any], tokenizer: Any) -> list[str]:
    """Write the lines that a run prints of one set.

    Args:
        name: demonstrations, comparisons or prompts.
        report: Of the set, with its train and held-out sizes.
        row: The row that is shown.
    """
    lost = {reason: n["before"] - n["after"] for reason, n in report["counts"].items()}
    left = [f"{n:,} {reason}" for reason, n in lost.items() if n > 0]
    line = f"{name}: {', '.join(report['read_as'])}; {report['rows']:,} rows read, "
    line += f"{report['train']:,} {'pairs ' * (name == 'comparisons')}to train on, "
    line += f"{report['held_out']:,} held out"
    line += f"; left out: {', '.join(left)}" if left else ""
    unread = [c for source in report["sources"] for c in source.get("columns_not_read", [])]
    line += f"; not read: {', '.join(dict.fromkeys(unread))}" if unread else ""
    notes = [f"  {note}" for note in report["notes"]]
    return [line, *notes, f"  as the model sees it: {_shown(row, tokenizer)}"]


def _shown(row: Mapping[str, Any], tokenizer: Any) -> str:
    [ids] = prompt_ids(tokenizer, [row["prompt"]])
    shown = _short(tokenizer.decode(ids))
    answer = row.get("completion", row.get("chosen"))
    if answer is None:
        return shown
    text = answer if isinstance(answer, str) else answer[-1]["content"]
    [ids] = completion_ids(tokenizer, [text])
    return f"{shown} ▸ {_short(tokenizer.decode([*ids, tokenizer.eos_token_id]))}"


def _short(text: str) -> str:
    """Return beginning and end on one line, with control characters escaped."""
    if len(text) > _WIDTH:
        half = _WIDTH // 2
        return f"{excerpt(text[:half], _WIDTH * 6)} … {excerpt(text[-half:], _WIDTH * 6)}"
    return excerpt(text, _WIDTH * 6)
