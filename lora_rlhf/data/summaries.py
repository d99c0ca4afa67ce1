# SPDX-License-Identifier: Apache-2.0
"""Lines that a run prints of a set: layout, rows, losses, and one row as the model sees it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .sources import excerpt
from .tokenization import completion_ids, prompt_ids

_WIDTH, _MOST = 160, 20
"""Characters of a text, and notes or columns, that are shown."""


def lines(name: str, report: dict[str, Any], row: Mapping[str, Any], tokenizer: Any) -> list[str]:
    """Write the lines that a run prints of one set.

    Args:
        name: demonstrations, comparisons or prompts.
        report: Of the set, with its train and held-out sizes.
        row: The row that is shown.
    """
    lost = {reason: n["before"] - n["after"] for reason, n in report["counts"].items()}
    counted = list(lost)
    cut = counted.index("expanded to pairs") if name == "comparisons" else 0
    of_rows, left = (
        [f"{lost[reason]:,} {reason}" for reason in some if lost[reason] > 0]
        for some in (counted[:cut], counted[cut:])
    )
    made = report["counts"]["expanded to pairs"]["after"] if cut else report["rows"]
    kept = report["train"] + (0 if "evaluate" in report else report["held_out"])
    line = f"{name}: {', '.join(report['read_as'])}; {report['rows']:,} rows read, "
    line += f"{', '.join(of_rows)} left out, " if of_rows else ""
    line += f"as {made:,} pairs, " if made != report["rows"] else ""
    if more := kept + sum(lost[r] for r in counted[cut:] if lost[r] > 0) - made:
        line += f"{more:,} made of them, "
    line += f"{report['train']:,} {'pairs ' * (name == 'comparisons')}to train on"
    if own := report.get("evaluate"):
        line += f"; {report['held_out']:,} of {own['rows']:,} rows of data.evaluate to evaluate on"
    else:
        line += f", {report['held_out']:,} held out"
    line += f"; left out: {', '.join(left)}" if left else ""
    unread = [c for source in report["sources"] for c in source.get("columns_not_read", [])]
    columns = [*dict.fromkeys(unread)]
    line += f"; not read: {', '.join(columns[:_MOST])}" if columns else ""
    line += f" and {len(columns) - _MOST:,} more columns" if len(columns) > _MOST else ""
    notes = [f"  {note}" for note in report["notes"]]
    if len(notes) > _MOST:
        more = (
            f"  and {len(notes) - _MOST:,} more notes, under data.{name} in the run's record.json"
        )
        notes = [*notes[:_MOST], more]
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
