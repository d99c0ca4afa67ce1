# SPDX-License-Identifier: Apache-2.0
"""Thumbs from Open WebUI's export of feedback, as pairs.

Two answers to the same conversation are a pair if one person gave thumbs up to one of them and
thumbs down to the other. All other thumbs are counted by the reason for which they are of no use.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lora_rlhf.data import sources
from lora_rlhf.recipe.schema import DataSource

from .foreign_formats import BETTER, Import, Item, Names, Reply, Unusable, check_keys, mapping
from .labels import LONGEST_NOTE, Answer, Task

_FEEDBACK = (
    "id", "user_id", "version", "type", "data", "meta", "snapshot", "created_at", "updated_at",
    "user",
)  # fmt: skip
_DATA = ("rating", "model_id", "sibling_model_ids", "reason", "comment", "tags", "details")
_META = (
    "arena", "model_id", "message_id", "message_index", "chat_id", "base_models", "tags",
)  # fmt: skip


@dataclass(frozen=True)
class _Thumb:
    where: str
    person: str
    prompt: tuple[dict[str, str], ...]
    answer: Answer
    up: bool
    note: str
    created: int


def read(path: Path, names: Names, own: Mapping[str, Task]) -> Import:
    """Read an export of feedback: the page Evaluations, or /api/v1/evaluations/feedbacks.

    Raises:
        DataError: It is no such file, or holds an unknown field, with its place.
    """
    imported = Import()
    groups: dict[tuple[str, str], list[_Thumb]] = defaultdict(list)
    for where, row in sources.read(DataSource(path=str(path)), sources.Skips()):
        try:
            thumb = _thumb(where, row, names)
            groups[thumb.person, json.dumps(thumb.prompt)].append(thumb)
        except Unusable as reason:
            imported.unused[str(reason)] += 1
    for thumbs in groups.values():
        by_text = {thumb.answer.text: thumb for thumb in thumbs}  # the last thumb on a text counts
        imported.unused["thumbs on the same text, of which the last counts"] += len(thumbs) - len(
            by_text
        )
        up = [thumb for thumb in by_text.values() if thumb.up]
        down = [thumb for thumb in by_text.values() if not thumb.up]
        imported.items += [_pair(good, bad) for good in up for bad in down]
        if not (up and down):
            side = "up" if up else "down"
            imported.unused[f"thumbs {side} without one {'down' if up else 'up'}"] += len(by_text)
    return imported


def _thumb(where: str, row: dict[str, Any], names: Names) -> _Thumb:
    """Read one feedback with the conversation that led to the answer."""
    check_keys(where, "a feedback", row, _FEEDBACK, names)
    data = mapping(where, "data", row.get("data") or {})
    meta = mapping(where, "meta", row.get("meta") or {})
    check_keys(where, "data", data, _DATA, names)
    check_keys(where, "meta", meta, _META, names)
    if row.get("type") != "rating":
        raise Unusable("feedback that is no rating")
    rating = str(data.get("rating"))
    if rating not in ("1", "-1"):
        raise Unusable("ratings without a thumb")
    prompt, answer = _conversation(row.get("snapshot"), meta.get("message_id"))
    note = " · ".join(str(data[key]) for key in ("reason", "comment") if data.get(key))
    when = row.get("updated_at") or row.get("created_at") or 0
    person = str(row.get("user_id"))
    return _Thumb(where, person, prompt, answer, rating == "1", note[:LONGEST_NOTE], int(when))


def _conversation(snapshot: Any, name: Any) -> tuple[tuple[dict[str, str], ...], Answer]:
    """Return the turns before an answer, and the answer."""
    chat = snapshot
    for key in ("chat", "chat", "history", "messages"):
        chat = chat.get(key) if isinstance(chat, dict) else None
    if not isinstance(chat, dict):
        raise Unusable("thumbs without the chat (export them with the snapshot)")
    answer = chat.get(name)
    if not isinstance(answer, dict) or not isinstance(answer.get("content"), str):
        raise Unusable("thumbs on an answer that is not in the chat")
    turns, parent, seen = [], answer.get("parentId"), set()
    while parent is not None and parent not in seen:
        seen.add(parent)
        turn = chat.get(parent)
        if not isinstance(turn, dict) or not isinstance(turn.get("content"), str):
            raise Unusable("thumbs on an answer whose conversation is incomplete")
        if turn.get("files"):
            raise Unusable("thumbs on answers about a file")
        turns.append({"role": str(turn.get("role")), "content": turn["content"]})
        parent = turn.get("parentId")
    if not turns or turns[0]["role"] != "user" or not turns[0]["content"].strip():
        raise Unusable("thumbs on an answer without a question")
    return tuple(turns[::-1]), Answer(str(answer.get("model")), answer["content"])


def _pair(good: _Thumb, bad: _Thumb) -> Item:
    first, second = sorted((good, bad), key=lambda thumb: thumb.answer.text)
    content = [first.prompt, first.answer.text, second.answer.text]
    name = f"open-webui/{hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]}"
    answers: tuple[Answer, ...] = (first.answer, second.answer)
    if first.answer.model == second.answer.model:
        answers = tuple(Answer(f"{one.model} {n}", one.text) for n, one in enumerate(answers, 1))
    value = {"strength": BETTER if second is good else -BETTER}
    note = "\n".join(one.note for one in (first, second) if one.note)[:LONGEST_NOTE]
    latest = max(good.created, bad.created)
    created = datetime.fromtimestamp(latest, UTC).isoformat(timespec="milliseconds")
    reply = Reply(good.person, "pair", value, note=note, created=created)
    return Item(good.where, Task(name, "pair", first.prompt, answers), (reply,))
