# SPDX-License-Identifier: Apache-2.0
"""Parse rows of every known layout into a prompt and its ranked answers.

Text becomes messages if the tokenizer has a chat template.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from lora_rlhf.errors import DataError, TokenizerError

from .sources import Row, Skips, excerpt
from .tokenization import Turns

Message = dict[str, str]

LAYOUTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "demonstrations": (
        ("prompt", "completion"),
        ("messages",),
        ("prompt", "completions", "ranks"),
        ("chosen", "rejected"),
    ),
    "comparisons": (("prompt", "completions", "ranks"), ("chosen", "rejected")),
    "prompts": (("prompt",), ("messages",), ("chosen", "rejected")),
    "text": (("text",),),
}
"""Set -> the layouts that it accepts, tried in this order.

{"prompt": "2 + 2?", "completion": "4"}
{"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}
{"prompt": "2 + 2?", "completions": ["5", "4"], "ranks": [2, 1]}
{"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}
"""
LAYOUTS["evaluate"] = LAYOUTS["prompts"]

ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant",
             "observation": "tool"}  # fmt: skip
_KNOWN_NAMES = {
    "prompt": ("instruction", "question", "query", "goal", "input", "user", "Question"),
    "completion": ("response", "output", "answer", "target", "Best Answer"),
    "chosen": ("preferred", "winner", "response_chosen", "better"),
    "rejected": ("dispreferred", "loser", "response_rejected", "worse"),
    "messages": ("conversation", "conversations", "dialog", "dialogue"),
}
_TRANSCRIPT = re.compile(r"\s*Human:.*\n\nAssistant:", re.DOTALL)
_SPEAKER = re.compile(r"\n\n(Human|Assistant):")
_TRANSCRIPTS_READ = "HH-RLHF transcripts were read as messages"


@dataclass
class Example:
    """One prompt and its answers; `ranks` (1 = best) is None for answers without a comparison."""

    prompt: Turns
    answers: list[Turns] = field(default_factory=list)
    ranks: list[float] | None = None
    margin: float | None = None
    item: str = ""


class _Unfit(Exception):
    """A row that cannot be used; collected, so that one error shows several."""


def examples(
    rows: list[Row], name: str, chat: bool, notes: Counter[str], skips: Skips
) -> list[Example | None]:
    """Parse the rows of one source into examples for a set, in their order.

    Args:
        rows: As `sources.read` returns them.
        name: demonstrations, comparisons, prompts, evaluate or text (read as prompts).
        chat: The tokenizer has a chat template.
        notes: Counts converted rows by kind of conversion, for the report.
        skips: Takes rows that do not fit, up to its limit; the result then has None in their place.

    Raises:
        DataError: Columns are missing, null or of a wrong type; the first five such rows are shown.
        TokenizerError: The rows hold messages, but there is no chat template.
    """
    rows = [(where, _from_sharegpt(row, notes)) for where, row in rows]
    present = {key for _, row in rows for key, value in row.items() if value is not None}
    layout = next((one for one in LAYOUTS[name] if present.issuperset(one)), None)
    if layout is None:
        raise _no_layout(rows, name)
    parsed: list[Example | None] = []
    bad: list[tuple[str, str]] = []
    for where, row in rows:
        try:
            example = _parse(row, layout, chat, notes)
            parsed.append(_as_chat(example, notes) if chat else _as_text(example, where))
        except _Unfit as error:
            bad.append((where, str(error)))
            parsed.append(None)
    if len(bad) <= skips.most - len(skips.seen):
        skips.seen += [DataError(text, where=where) for where, text in bad]
    elif bad:
        raise DataError(
            f"{len(bad)} of {len(rows)} rows do not fit {' + '.join(layout)}{_shown(bad)}",
            where=bad[0][0],
            expected=_accepted(name),
            remedy=f"correct or remove these rows, skip them by `skip_bad: "
            f"{len(skips.seen) + len(bad)}`, or map the right columns with `columns:`",
        )
    if name != "comparisons" and layout == ("chosen", "rejected"):
        chosen = name == "demonstrations"
        what = "demonstrations are the chosen answers" if chosen else "prompts are those"
        notes[f"{what} of a comparison file"] += len(parsed) - parsed.count(None)
    return parsed


def transcript(text: str) -> list[Message] | None:
    r"""Parse an HH-RLHF transcript (`\n\nHuman: ...\n\nAssistant: ...`); None for other text."""
    if not _TRANSCRIPT.match(text):
        return None
    parts = _SPEAKER.split("\n\n" + text.lstrip())[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[speaker], "content": words.strip()}
        for speaker, words in zip(parts[::2], parts[1::2], strict=True)
    ]


def text_of(turns: Turns) -> str:
    """Return the content of all turns, one turn a line."""
    return turns if isinstance(turns, str) else "\n".join(turn["content"] for turn in turns)


def _from_sharegpt(row: dict[str, Any], notes: Counter[str]) -> dict[str, Any]:
    """Convert ShareGPT's turns of `from` and `value`, and its `conversations`, to messages.

    TRL's `maybe_convert_to_chatml` would keep the roles `human` and `gpt`, and load torch.
    """
    converted, sharegpt = dict(row), False
    if "conversations" in row:
        converted.setdefault("prompt" if "chosen" in row else "messages", row["conversations"])
    for column in ("prompt", "completion", "messages", "chosen", "rejected"):
        turns = converted.get(column)
        turns = [turns] if isinstance(turns, dict) else turns
        if not isinstance(turns, list) or not turns:
            continue
        if all(isinstance(turn, dict) and {"from", "value"} <= turn.keys() for turn in turns):
            converted[column] = [
                {"role": _SHAREGPT.get(str(t["from"]), t["from"]), "content": t["value"]}
                for t in turns
            ]
            sharegpt = True
    if sharegpt:
        notes["turns of from and value (ShareGPT) were read as messages"] += 1
    return converted


def _accepted(name: str) -> str:
    layouts = ", or ".join(" + ".join(layout) for layout in LAYOUTS[name])
    kinds = "" if name == "text" else " (text or messages; chosen may include the prompt)"
    return f"for {name}, the columns {layouts}{kinds}"


def _shown(rows: list[tuple[str, str]]) -> str:
    return "".join(f"\n  {where.rpartition(os.sep)[2]}: {text}" for where, text in rows[:5])


def _no_layout(rows: list[Row], name: str) -> DataError:
    """Create the error for a source that fits no layout, and suggest a mapping of columns."""
    columns = [key for key in rows[0][1] if isinstance(key, str)]
    remedy = "map the columns in the recipe with `columns: {our name: the file's name}`"
    for layout in LAYOUTS[name]:
        guess = {
            ours: next((n for n in (ours, *_KNOWN_NAMES.get(ours, ())) if n in columns), "")
            for ours in layout + (("prompt",) if "chosen" in layout else ())
        }
        if all(guess[ours] for ours in layout):
            pairs = ", ".join(f"{a}: {b}" for a, b in guess.items() if b not in ("", a))
            remedy = f"try `columns: {{{pairs}}}`"
            break
    return DataError(
        f"no usable columns for {name}; found: {', '.join(columns)}"
        + _shown([(where, excerpt(row)) for where, row in rows[:5]]),
        where=rows[0][0],
        expected=_accepted(name),
        remedy=remedy,
    )


def _parse(
    row: dict[str, Any], layout: tuple[str, ...], chat: bool, notes: Counter[str]
) -> Example:
    if layout == ("prompt",):
        example = Example(_turns(row, "prompt"))
    elif layout == ("text",):
        if not isinstance(row.get("text"), str):
            raise _Unfit(f"column 'text' must be text: {excerpt(row.get('text'))}")
        example = Example(_valid(row["text"], "text"))
    elif layout == ("messages",):
        messages = _turns(row, "messages")
        if isinstance(messages, str):
            raise _Unfit(f"column 'messages' must be messages, not text: {excerpt(messages)}")
        cut = len(messages) - (messages[-1]["role"] == "assistant")
        example = Example(messages[:cut], [messages[cut:]] if messages[cut:] else [])
    elif layout == ("prompt", "completion"):
        example = Example(_turns(row, "prompt"), [_turns(row, "completion")])
    elif layout == ("chosen", "rejected"):
        margin = _margin(row)
        example = _pair(row, chat, notes)
        example.ranks, example.margin = [1, 2], margin
    else:
        example = _ranking(row)
    item = row.get("item")
    example.item = item if isinstance(item, str) else ""
    return example


def _turns(row: dict[str, Any], column: str) -> Turns:
    """Return a checked text or list of messages, reduced to `role` and `content`."""
    value = row.get(column)
    if isinstance(value, str):
        return _valid(value, column)
    if value is None:
        raise _Unfit(f"column {column!r} is missing")
    if not isinstance(value, list) or not value:
        kind = type(value).__name__
        raise _Unfit(f"column {column!r} must be text or messages, not {kind}: {excerpt(value)}")
    turns = []
    for turn in value:
        content = turn.get("content") if isinstance(turn, dict) else None
        if not isinstance(content, str) or turn.get("role") not in ROLES:
            raise _Unfit(
                f"column {column!r}: {excerpt(turn)} is no message with text as content "
                f"and one of the roles {', '.join(ROLES)}"
            )
        turns.append({"role": turn["role"], "content": _valid(content, column)})
    return turns


def _valid(text: str, column: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        around = text[max(0, error.start - 20) : error.start + 20]
        raise _Unfit(
            f"column {column!r} holds half of a character (a lone surrogate): {excerpt(around)}"
        ) from None
    return text


def _ranking(row: dict[str, Any]) -> Example:
    answers, ranks = row.get("completions"), row.get("ranks")
    if not isinstance(answers, list) or len(answers) < 2:
        raise _Unfit(f"column 'completions' must be a list of two or more: {excerpt(answers)}")
    numbers = [_number(rank) for rank in ranks] if isinstance(ranks, list) else []
    finite = [rank for rank in numbers if rank is not None]
    if not len(finite) == len(numbers) == len(answers):
        raise _Unfit(f"column 'ranks' must be a list of {len(answers)} numbers: {excerpt(ranks)}")
    turns = [_turns({"completions": answer}, "completions") for answer in answers]
    return Example(_turns(row, "prompt"), turns, finite)


def _number(value: Any) -> float | None:
    """Return a finite number or None; Python's JSON parser allows NaN, Infinity and 10**400."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _margin(row: dict[str, Any]) -> float | None:
    """Return the column `margin`, which is text in a CSV; None for an empty cell."""
    value = row.get("margin")
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        margin = _number(float(value) if isinstance(value, str) else value)
    except ValueError:
        margin = None
    if margin is None:
        raise _Unfit(f"column 'margin' must be a finite number: {excerpt(value)}")
    return margin


def _pair(row: dict[str, Any], chat: bool, notes: Counter[str]) -> Example:
    """Parse a chosen and a rejected answer, with a prompt column or a common beginning."""
    chosen, rejected = _turns(row, "chosen"), _turns(row, "rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        both = transcript(chosen), transcript(rejected)
        if both[0] and both[1]:
            prompt, answers = _shared(both[0], both[1])
            if chat:
                notes[_TRANSCRIPTS_READ] += 1
                return Example(prompt, list(answers))
            question = _as_transcript(prompt) + "\n\nAssistant:" if prompt else ""
            texts = [_as_transcript(answer).removeprefix("\n\nAssistant:") for answer in answers]
            return Example(question, list(texts))
        if row.get("prompt") is None:
            cut = _shared_text(chosen, rejected)
            return Example(chosen[:cut], [chosen[cut:], rejected[cut:]])
    elif isinstance(chosen, str) or isinstance(rejected, str):
        raise _Unfit("columns 'chosen' and 'rejected': one is text, the other messages")
    elif row.get("prompt") is None or chosen[0]["role"] != "assistant":
        # UltraFeedback and others have a prompt column and repeat the prompt in chosen.
        prompt, answers = _shared(chosen, rejected)
        return Example(prompt, list(answers))
    return Example(_turns(row, "prompt"), [chosen, rejected])


def _as_transcript(messages: list[Message]) -> str:
    names = {"user": "Human", "assistant": "Assistant"}
    return "".join(f"\n\n{names[turn['role']]}: {turn['content']}" for turn in messages)


def _shared(a: list[Message], b: list[Message]) -> tuple[list[Message], list[list[Message]]]:
    """Split off the common first turns, up to a question; neither rest is empty."""
    cut = 0
    while cut < min(len(a), len(b)) - 1 and a[cut] == b[cut]:
        cut += 1
    while cut and a[cut - 1]["role"] == "assistant":
        cut -= 1
    return a[:cut], [a[cut:], b[cut:]]


def _shared_text(a: str, b: str) -> int:
    """Return the length of the common beginning, cut at the end of a word."""
    cut = min(len(os.path.commonprefix([a, b])), len(a) - 1, len(b) - 1)
    while cut > 0 and not a[cut - 1].isspace() and not (a[cut] + b[cut]).isspace():
        cut -= 1
    return len(a[: max(0, cut)].rstrip())


def _as_chat(example: Example, notes: Counter[str]) -> Example:
    """Wrap text into messages: one user turn, one assistant turn, or the turns of a transcript."""
    if isinstance(example.prompt, str):
        turns = transcript(example.prompt)
        if turns:
            if turns[-1] == {"role": "assistant", "content": ""}:
                turns = turns[:-1]
            notes[_TRANSCRIPTS_READ] += 1
        elif not example.item:
            notes["plain text was wrapped into one user and one assistant message"] += 1
        example.prompt = turns or [{"role": "user", "content": example.prompt.strip()}]
    example.answers = [
        [{"role": "assistant", "content": answer.strip()}] if isinstance(answer, str) else answer
        for answer in example.answers
    ]
    return example


def _as_text(example: Example, where: str) -> Example:
    if not all(isinstance(turns, str) for turns in (example.prompt, *example.answers)):
        raise TokenizerError(
            "the data holds messages, but the tokenizer has no chat template",
            where=where,
            expected="a tokenizer with a chat template, or columns of plain text",
            remedy="choose an instruct model, or turn the messages into text yourself",
        )
    return example
