# SPDX-License-Identifier: Apache-2.0
"""Read the rows of NVIDIA's HelpSteer2 and HelpSteer3 as prompts with scored answers."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from typing import Any

from .sources import Row

_RATINGS = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
_PAIRS = (
    ("prompt", "response_1", "response_2", "preference_strength"),  # HelpSteer2's preferences
    ("context", "response1", "response2", "overall_preference"),  # HelpSteer3
)
_TURN = re.compile(r"\n*<extra_id_1>(User|Assistant)\n")


def rows_of(rows: list[Row], notes: Counter[str]) -> list[Row]:
    """Return HelpSteer's rows in the layout prompt, completions, scores; others as they are.

    In HelpSteer2 rows that follow each other have the same prompt and one answer each, and the
    score is `helpfulness` (0 to 4). A preference is -3 (the first answer is much better) to 3.
    """
    columns = set(rows[0][1]) if rows else set[Any]()
    if columns >= {"prompt", "response", *_RATINGS}:
        groups = itertools.groupby(rows, key=lambda row: row[1].get("prompt"))
        made = [_rated([*group]) for _, group in groups]
    elif names := next((names for names in _PAIRS if columns.issuperset(names)), None):
        made = [(where, _pair(row, *names)) for where, row in rows]
    else:
        return rows
    notes["HelpSteer's columns were read"] += len(rows)
    return made


def _rated(group: list[Row]) -> Row:
    """Join the rows of one prompt."""
    where, first = group[0]
    others = {k: v for k, v in first.items() if k not in (*_RATINGS, "response")}
    answers = [row.get("response") for _, row in group]
    scores = [row.get("helpfulness") for _, row in group]
    prompt = _conversation(first.get("prompt"))
    return where, {**others, "prompt": prompt, "completions": answers, "scores": scores}


def _pair(row: dict[str, Any], prompt: str, one: str, two: str, preference: str) -> dict[str, Any]:
    left = (prompt, one, two, "split")
    others = {k: v for k, v in row.items() if k not in left and "preference" not in k}
    answers, scores = [row.get(one), row.get(two)], [0, row.get(preference)]
    others["prompt"] = _conversation(row.get(prompt))
    return {**others, "completions": answers, "scores": scores}


def _conversation(prompt: Any) -> Any:
    """Return the turns of a prompt in which `<extra_id_1>` stands before every turn but the first.

    Other prompts are returned as they are.
    """
    if not isinstance(prompt, str):
        return prompt
    first, *rest = _TURN.split(prompt)
    if not rest:
        return prompt
    turns = [("User", first), *zip(rest[::2], rest[1::2], strict=True)]
    return [{"role": role.lower(), "content": text} for role, text in turns]
