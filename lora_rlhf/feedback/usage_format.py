# SPDX-License-Identifier: Apache-2.0
"""Thumbs down of `chat` and `serve` as tasks: the conversations whose answer should be better.

A conversation with several answers that got thumbs, one of them down, is a pair or a ranking of
them; one with a single answer is a demonstration: people write what should have been said.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_rlhf.serving.usage_store import UsageStore

from .foreign_formats import Import, Item, Names, turns
from .labels import ANSWERS, Answer, Task

_REASON = 200  # characters of a comment


def read(path: Path, names: Names, own: Mapping[str, Task]) -> Import:
    """Read a usage store.

    Raises:
        UsageError: There is no such store.
        SetupError: It is another file, or damaged.
    """
    imported = Import()
    with UsageStore(path).open(readonly=True) as store:
        thumbs = store.thumbs()
    of_prompt: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for thumb in thumbs:
        if thumb["messages"]:
            of_prompt[json.dumps(thumb["messages"], sort_keys=True)].append(thumb)
        else:
            imported.unused["thumbs whose text is not stored"] += 1
    for prompt, given in of_prompt.items():
        if all(thumb["good"] for thumb in given):
            imported.unused["thumbs up without one down"] += len(given)
            continue
        imported.items.append(Item(f"{path}:{given[0]['row']}", _task(str(path), prompt, given)))
    return imported


def _task(where: str, prompt: str, thumbs: list[dict[str, Any]]) -> Task:
    """Return the task of one conversation, with the same id in every import."""
    texts = {thumb["answer"]: str(thumb["model"] or "model") for thumb in thumbs}
    texts = dict([*texts.items()][: ANSWERS["ranking"][1]])
    kind = {1: "demonstration", 2: "pair"}.get(len(texts), "ranking")
    answers = () if len(texts) == 1 else texts.items()
    several = len({*texts.values()}) < len(texts)  # one model gave two of them
    made = tuple(
        Answer(f"{model} {n}" if several else model, text)
        for n, (text, model) in enumerate(answers, 1)
    )
    name = hashlib.sha256(json.dumps([prompt, [a.text for a in made]]).encode()).hexdigest()[:16]
    comments = " · ".join(t["comment"] for t in thumbs if not t["good"] and t["comment"])
    why = f"thumb down: {comments}"[:_REASON] if comments else "thumb down"
    return Task(f"usage/{name}", kind, turns(where, json.loads(prompt)), made, why=why)
