# SPDX-License-Identifier: Apache-2.0
"""OpenAssistant's message trees as rows: each question with its ranked replies.

Read are its files of trees (`prompt` with nested `replies`) and its rows of messages (`parent_id`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from lora_rlhf.errors import DataError

from .sources import Row, excerpt

_MESSAGE = {"message_id", "parent_id", "text", "role"}
_ROLES = {"prompter": "user", "assistant": "assistant"}

Turns = list[dict[str, str]]


def rows_of(rows: Sequence[Row], name: str, lang: str | None, notes: Counter[str]) -> Sequence[Row]:
    """Return the rows that a set reads from message trees; other rows as they are.

    Deleted, synthetic and rejected messages are left out with all replies to them.

    Args:
        name: The set: comparisons get all ranked replies to a question, demonstrations the best.
        lang: Language of the messages to keep; None: all.
        notes: Counts what was left out.

    Raises:
        DataError: A message is not as expected, `lang` is given for other rows, or none is left.
    """
    first = rows[0][1] if rows else {}
    if isinstance(first.get("prompt"), dict) and "replies" in first["prompt"]:
        roots = [(where, row.get("prompt")) for where, row in rows]
    elif first.keys() >= _MESSAGE:
        roots = _joined(rows, notes)
    elif lang is not None:
        raise DataError(
            "`lang` is set, and the rows are no message trees",
            where=rows[0][0] if rows else "",
            expected="OpenAssistant's trees or messages",
            remedy="leave `lang` out",
        )
    else:
        return rows
    made = [(where, row) for where, root in roots for row in _walk(where, root, name, lang, notes)]
    notes["rows made of message trees"] += len(made)
    if not made:
        raise DataError(
            f"no message of the trees is of use for {name}: "
            + ", ".join(f"{count} {reason}" for reason, count in notes.items() if count),
            where=rows[0][0],
            expected="questions with replies" + ", with ranks" * (name == "comparisons"),
        )
    return made


def _joined(rows: Sequence[Row], notes: Counter[str]) -> list[tuple[str, Any]]:
    """Return the roots of messages in any order, with their replies inside."""
    replies: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    roots, known = list[tuple[str, Any]](), set()
    for where, row in rows:
        message = {**row, "replies": replies[row.get("message_id")], "where": where}
        known.add(row.get("message_id"))
        if row.get("parent_id") is None:
            roots.append((where, message))
        else:
            replies[row["parent_id"]].append(message)
    if lost := sum(len(replies[parent]) for parent in replies.keys() - known):
        notes["replies to a message that is not in the file were left out"] += lost
    return roots


def _walk(
    where: str, root: Any, name: str, lang: str | None, notes: Counter[str]
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a tree; all belong to the user who wrote its first message, if known."""
    stack: list[tuple[str, Any, Turns]] = [(where, root, [])]
    _checked(where, root)
    user = {"user": str(root["user_id"])} if root.get("user_id") else {}
    while stack:
        place, node, context = stack.pop()
        role, text = _checked(place, node)
        if reason := _unwanted(node, lang):
            notes[f"messages of trees that are {reason} were left out, with their replies"] += 1
            continue
        turns = [*context, {"role": role, "content": text}]
        replies = [(str(one.get("where", place)), one) for one in node.get("replies") or []]
        stack += [(at, one, turns) for at, one in reversed(replies)]
        if role == "user" and (row := _row(turns, replies, lang, name)):
            yield {**row, **user}


def _checked(where: str, node: Any) -> tuple[str, str]:
    role = _ROLES.get(str(node.get("role"))) if isinstance(node, dict) else None
    if role is None or not isinstance(node.get("text"), str):
        raise DataError(
            f"no message of a tree: {excerpt(node)}",
            where=where,
            expected=f"text, and a role: {', '.join(_ROLES)}",
        )
    return role, node["text"]


def _unwanted(node: dict[str, Any], lang: str | None) -> str:
    if node.get("deleted"):
        return "deleted"
    if node.get("synthetic"):
        return "synthetic"
    if node.get("review_result") is False:
        return "rejected by reviewers"
    return "in other languages" if lang is not None and node.get("lang") != lang else ""


def _row(
    turns: Turns, replies: list[tuple[str, Any]], lang: str | None, name: str
) -> dict[str, Any] | None:
    """Return the row of a question; None if its replies are of no use for this set."""
    if name in ("prompts", "evaluate"):
        return {"prompt": turns}
    answers = [one for at, one in replies if _checked(at, one) and not _unwanted(one, lang)]
    ranked = [one for one in answers if isinstance(one.get("rank"), int)]
    if name == "comparisons":
        order = [one["rank"] for one in ranked]
        ranks = [1 + sum(other < rank for other in order) for rank in order]
        row = {"prompt": turns, "completions": [one["text"] for one in ranked], "ranks": ranks}
        return row if len(ranked) > 1 else None
    best = min(ranked, key=lambda one: int(one["rank"])) if ranked else None
    if best is None and len(answers) == 1:
        best = answers[0]
    return best and {"messages": [*turns, {"role": "assistant", "content": best["text"]}]}
