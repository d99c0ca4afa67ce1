# SPDX-License-Identifier: Apache-2.0
"""Read `samples.jsonl`: the answer of each model to each held-out prompt."""

from __future__ import annotations

import json
from typing import Any

from .disk import damaged
from .record import Record

_KEYS = {"index": int, "model": str, "prompt": str, "completion": str}


def prompt_text(prompt: str | list[dict[str, Any]]) -> str:
    """Format a prompt for people: the text itself, or one line per message with its role."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return str(prompt[0]["content"])
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def read(record: Record) -> dict[int, dict[str, dict[str, Any]]]:
    """Read the samples as index of the prompt -> model -> line; empty if there are none.

    Raises:
        DamageError: The file is not as the run wrote it.
    """
    path = record.verified("samples.jsonl")
    by_prompt: dict[int, dict[str, dict[str, Any]]] = {}
    raw = path.read_bytes() if path.exists() else b""
    for number, text in enumerate(raw.splitlines(), start=1):
        try:
            line = json.loads(text)
            for key, kind in _KEYS.items():
                if not isinstance(line[key], kind):
                    raise TypeError(f"{key} is {line[key]!r:.20}")
            by_prompt.setdefault(line["index"], {})[line["model"]] = line
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            what = f"line {number} is not a sample ({error!r:.80})"
            raise damaged(path, what, record.folder, "evaluate") from None
    return by_prompt


def sample_table(record: Record, count: int, model: str | None = None) -> list[dict[str, Any]]:
    """Choose samples for a table: half the worst answers of `model`, then the first prompts.

    Neither half can be cherry-picked. `model` is by default the last evaluated one.

    Returns:
        Dicts with `why` ("worst" or "first"), `index`, `prompt` and `answers` (model -> line of
        `samples.jsonl`); empty if the run has no samples of `model`.
    """
    by_prompt = read(record)
    models = list(dict.fromkeys(name for answers in by_prompt.values() for name in answers))
    model = model or (models[-1] if models else "")
    lines = [answers[model] for answers in by_prompt.values() if model in answers]
    ranked = sorted((line for line in lines if "score" in line), key=lambda line: line["score"])
    worst = [line["index"] for line in ranked[: (count + 1) // 2]]
    first = [line["index"] for line in lines if line["index"] not in worst]
    chosen = [("worst", i) for i in worst] + [("first", i) for i in first]
    return [
        {
            "why": why,
            "index": i,
            "prompt": next(iter(by_prompt[i].values()))["prompt"],
            "answers": by_prompt[i],
        }
        for why, i in chosen[:count]
    ]
