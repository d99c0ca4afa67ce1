# SPDX-License-Identifier: Apache-2.0
"""Rows as the model sees them: the prompt dim, what is trained on in colour."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.text import Text

from lora_rlhf.data.tokenization import Turns, completion_ids, prompt_ids
from lora_rlhf.redaction import printable, safe

_PARTS = {
    "prompt": ("prompt", "dim"), "completion": ("trained", "green"), "chosen": ("chosen", "green"),
    "rejected": ("rejected", "red"),
}  # fmt: skip
"""Column -> (label, style). Reward models read chosen and rejected up to their last token."""

_WIDEST = 600


def lines(row: Mapping[str, Any], tokenizer: Any) -> Iterator[Text]:
    """Yield a row part by part, the tokens of the base's chat template included.

    Args:
        row: `prompt`, and `completion`, or `chosen` and `rejected`, or none of them.
        tokenizer: None: the base is not here, and turns are shown without its template.
    """
    for column, (label, style) in _PARTS.items():
        if column in row:
            text = _decoded(column, row[column], tokenizer)
            if len(text) > _WIDEST:
                text = f"{text[: _WIDEST // 2]} … {text[-_WIDEST // 2 :]}"
            for number, line in enumerate(printable(safe(text)).split("\n")):
                head = "" if number else label
                yield Text.assemble(f"    {head:8} | ", (line, style))


def _decoded(column: str, turns: Turns, tokenizer: Any) -> str:
    if tokenizer is not None and column == "prompt":
        return str(tokenizer.decode(prompt_ids(tokenizer, [turns])[0]))
    if tokenizer is not None:
        text = turns if isinstance(turns, str) else turns[-1]["content"]
        ids = completion_ids(tokenizer, [text])[0]
        return str(tokenizer.decode([*ids, tokenizer.eos_token_id]))
    if isinstance(turns, str) or column != "prompt":
        return turns if isinstance(turns, str) else turns[-1]["content"]
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
