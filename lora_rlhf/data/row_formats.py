# SPDX-License-Identifier: Apache-2.0
"""The layouts that a row may have, and what becomes of them: one prompt and its ranked answers.

A text stays text for a tokenizer without a chat template, and becomes messages for one with it.
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

Message = dict[str, str]
Turns = str | list[Message]
"""A text, or messages with `role` and `content`."""

LAYOUTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "demonstrations": (
        ("prompt", "completion"),
        ("messages",),
        ("prompt", "completions", "ranks"),
        ("chosen", "rejected"),
    ),
    "comparisons": (("prompt", "completions", "ranks"), ("chosen", "rejected")),
    "prompts": (("prompt",), ("messages",), ("chosen", "rejected")),
}
"""The columns that make a row usable for a set, tried in this order."""

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


@dataclass
class Example:
    """One prompt and its answers; `ranks` (1 = best) is None where nothing was compared."""

    prompt: Turns
    answers: list[Turns] = field(default_factory=list)
    ranks: list[float] | None = None
    margin: float | None = None
    item: str = ""


class _Unfit(Exception):
    """What is wrong with one row; collected, so that an error can show several."""


def examples(
    rows: list[Row], name: str, chat: bool, notes: Counter[str], skips: Skips | None = None
) -> list[Example | None]:
    """The rows of one source as examples for the set `name`, in their order.

    Args:
        rows: As `sources.read` gives them.
        name: demonstrations, comparisons or prompts.
        chat: Whether the tokenizer has a chat template.
        notes: Counts of what was done to rows, for the report.
        skips: Takes the rows that do not fit, if it may: None stands in their place.

    Raises:
        DataError: Columns are missing, null or of a wrong type; the first five such rows are shown.
        TokenizerError: Messages, but no chat template.
    """
    rows = [(where, _from_sharegpt(row, notes)) for where, row in rows]
    present = {key for _, row in rows for key, value in row.items() if value is not None}
    fitting = [layout for layout in LAYOUTS[name] if present.issuperset(layout)]
    if not fitting:
        raise _no_layout(rows, name)
    good: list[Example | None] = []
    bad: list[tuple[str, str]] = []
    for where, row in rows:
        try:
            example = _parse(row, fitting[0])
            good.append(_as_chat(example, notes) if chat else _as_text(example, where))
        except _Unfit as error:
            bad.append((where, str(error)))
            good.append(None)
    if skips is not None and len(bad) <= skips.most - len(skips.seen):
        skips.seen += [DataError(text, where=where) for where, text in bad]
    elif bad:
        shown = "".join(f"\n  {where.rpartition(os.sep)[2]}: {text}" for where, text in bad[:5])
        raise DataError(
            f"{len(bad)} of {len(rows)} rows do not fit {' + '.join(fitting[0])}{shown}",
            where=bad[0][0],
            expected=_accepted(name),
            remedy="mend or remove these rows, or map the right columns with `columns:`",
        )
    if name != "comparisons" and fitting[0] == ("chosen", "rejected"):
        what = "prompts are those" if name == "prompts" else "demonstrations are the chosen answers"
        notes[f"{what} of a comparison file"] += len(good) - good.count(None)
    return good


def plain_texts(rows: list[Row], skips: Skips) -> list[str]:
    """The column `text` of the rows of one source, in their order.

    Raises:
        DataError: A row holds no text there, and `skips` may take no more.
    """
    good = []
    for where, row in rows:
        try:
            if not isinstance(row.get("text"), str):
                raise _Unfit(f"text: {row.get('text')!r:.80}")
            good.append(_sound(row["text"], "text"))
        except _Unfit as error:
            skips.take(
                DataError(
                    str(error),
                    where=where,
                    expected="a column `text` that holds text",
                    remedy="map it with `columns: {text: the file's name}`, or leave so many rows "
                    "out with `skip_bad:`",
                )
            )
    return good


def transcript(text: str) -> list[Message] | None:
    r"""Messages of an HH-RLHF transcript (`\n\nHuman: ...\n\nAssistant: ...`); None: it is none."""
    if not _TRANSCRIPT.match(text):
        return None
    parts = _SPEAKER.split("\n\n" + text.lstrip())[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[who], "content": said.strip()}
        for who, said in zip(parts[::2], parts[1::2], strict=True)
    ]


def text_of(turns: Turns) -> str:
    """All that is said in a text or in messages, one turn a line."""
    return turns if isinstance(turns, str) else "\n".join(turn["content"] for turn in turns)


def _from_sharegpt(row: dict[str, Any], notes: Counter[str]) -> dict[str, Any]:
    """The row with turns of `from` and `value` as messages, and `conversations` in its place.

    TRL's `maybe_convert_to_chatml` leaves `human` and `gpt` as they are, and brings torch along.
    """
    turned, spoken = dict(row), False
    if "conversations" in row:
        turned.setdefault("prompt" if "chosen" in row else "messages", row["conversations"])
    for column in ("prompt", "completion", "messages", "chosen", "rejected"):
        turns = turned.get(column)
        turns = [turns] if isinstance(turns, dict) else turns
        if (
            isinstance(turns, list)
            and turns
            and all(isinstance(turn, dict) and {"from", "value"} <= turn.keys() for turn in turns)
        ):
            turned[column] = [
                {"role": _SHAREGPT.get(str(t["from"]), t["from"]), "content": t["value"]}
                for t in turns
            ]
            spoken = True
    if spoken:
        notes["turns of from and value (ShareGPT) were read as messages"] += 1
    return turned


def _accepted(name: str) -> str:
    layouts = "; ".join(" + ".join(layout) for layout in LAYOUTS[name])
    return f"for {name}, the columns {layouts} (text or messages; a prompt may stand in chosen)"


def _no_layout(rows: list[Row], name: str) -> DataError:
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
    shown = "".join(f"\n  {w.rpartition(os.sep)[2]}: {excerpt(row)}" for w, row in rows[:5])
    return DataError(
        f"no usable columns for {name}; found: {', '.join(columns)}{shown}",
        where=rows[0][0],
        expected=_accepted(name),
        remedy=remedy,
    )


def _parse(row: dict[str, Any], layout: tuple[str, ...]) -> Example:
    if layout == ("prompt",):
        example = Example(_turns(row, "prompt"))
    elif layout == ("messages",):
        messages = _turns(row, "messages")
        if isinstance(messages, str):
            raise _Unfit(f"column 'messages': text, not messages: {excerpt(messages)}")
        cut = len(messages) - (messages[-1]["role"] == "assistant")
        example = Example(messages[:cut], [messages[cut:]] if messages[cut:] else [])
    elif layout == ("prompt", "completion"):
        example = Example(_turns(row, "prompt"), [_turns(row, "completion")])
    elif layout == ("chosen", "rejected"):
        example = _pair(row)
    else:
        example = _ranking(row)
    item = row.get("item")
    example.item = item if isinstance(item, str) else ""
    return example


def _turns(row: dict[str, Any], column: str) -> Turns:
    """A text or a list of messages, checked; other keys of a message are left out."""
    value = row.get(column)
    if isinstance(value, str):
        return _sound(value, column)
    if not isinstance(value, list) or not value:
        what = "missing" if value is None else f"a {type(value).__name__}: {excerpt(value)}"
        raise _Unfit(f"column {column!r} is {what}, not text or messages")
    turns = []
    for turn in value:
        content = turn.get("content") if isinstance(turn, dict) else None
        if not isinstance(content, str) or turn.get("role") not in ROLES:
            raise _Unfit(
                f"column {column!r}: {excerpt(turn)} is no message with text as content "
                f"and one of the roles {', '.join(ROLES)}"
            )
        turns.append({"role": turn["role"], "content": _sound(content, column)})
    return turns


def _sound(text: str, column: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        around = text[max(0, error.start - 20) : error.start + 20]
        raise _Unfit(f"column {column!r} holds half of a character: {excerpt(around)}") from None
    return text


def _ranking(row: dict[str, Any]) -> Example:
    answers, ranks = row.get("completions"), row.get("ranks")
    if not isinstance(answers, list) or len(answers) < 2:
        raise _Unfit(f"column 'completions' is no list of two or more: {excerpt(answers)}")
    numbers = [_number(rank) for rank in ranks] if isinstance(ranks, list) else []
    finite = [rank for rank in numbers if rank is not None]
    if len(finite) != len(answers) or len(numbers) != len(answers):
        raise _Unfit(f"column 'ranks' is no list of {len(answers)} numbers: {excerpt(ranks)}")
    turns = [_turns({"completions": answer}, "completions") for answer in answers]
    return Example(_turns(row, "prompt"), turns, finite)


def _number(value: Any) -> float | None:
    """A finite number; None for whatever is none. JSON of Python has NaN, Infinity and 10**400."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _margin(row: dict[str, Any]) -> float | None:
    """The column `margin`; in a CSV it is text, and an empty cell is no margin."""
    found = row.get("margin")
    if isinstance(found, str):
        if not found.strip():
            return None
        try:
            found = float(found)
        except ValueError:
            found = None
    margin = _number(found)
    if margin is None and row.get("margin") is not None:
        raise _Unfit(f"column 'margin' is no finite number: {excerpt(row['margin'])}")
    return margin


def _pair(row: dict[str, Any]) -> Example:
    """A chosen and a rejected answer, with an explicit prompt or with one that both begin with."""
    chosen, rejected = _turns(row, "chosen"), _turns(row, "rejected")
    if isinstance(chosen, str) is not isinstance(rejected, str):
        raise _Unfit("columns 'chosen' and 'rejected': one is text, the other messages")
    margin = _margin(row)
    if isinstance(chosen, str) and isinstance(rejected, str):
        both = transcript(chosen), transcript(rejected)
        if both[0] and both[1]:
            prompt, answers = _shared(both[0], both[1])
            example = Example(_Transcript(prompt), [_Transcript(answer) for answer in answers])
        elif row.get("prompt") is not None:
            example = Example(_turns(row, "prompt"), [chosen, rejected])
        else:
            cut = _shared_text(chosen, rejected)
            example = Example(chosen[:cut], [chosen[cut:], rejected[cut:]])
    elif row.get("prompt") is not None and chosen[0]["role"] == "assistant":  # type: ignore[index]
        example = Example(_turns(row, "prompt"), [chosen, rejected])
    else:  # UltraFeedback and others repeat the prompt in chosen, beside a column of its own
        prompt, messages = _shared(list(chosen), list(rejected))  # type: ignore[arg-type]
        example = Example(prompt, list(messages))
    example.ranks, example.margin = [1, 2], margin
    return example


class _Transcript(list):  # type: ignore[type-arg]
    """Messages that were a transcript, and can be one again."""

    def text(self) -> str:
        names = {"user": "Human", "assistant": "Assistant"}
        return "".join(f"\n\n{names[turn['role']]}: {turn['content']}" for turn in self)


def _shared(a: list[Message], b: list[Message]) -> tuple[list[Message], list[list[Message]]]:
    """The turns that both begin with, up to a turn that asks; the rest of each, never empty."""
    cut = 0
    while cut < min(len(a), len(b)) - 1 and a[cut] == b[cut]:
        cut += 1
    while cut and a[cut - 1]["role"] == "assistant":
        cut -= 1
    return a[:cut], [a[cut:], b[cut:]]


def _shared_text(a: str, b: str) -> int:
    """Length of the text that both begin with, without a half word and the space before it."""
    cut = min(len(os.path.commonprefix([a, b])), len(a) - 1, len(b) - 1)
    while cut > 0 and not a[cut - 1].isspace() and not (a[cut] + b[cut]).isspace():
        cut -= 1
    return len(a[: max(0, cut)].rstrip())


def _as_chat(example: Example, notes: Counter[str]) -> Example:
    """Wrap text into messages: one user turn, one assistant turn, or the turns of a transcript."""
    if isinstance(example.prompt, str):
        turns = transcript(example.prompt)
        if turns:
            last = turns[-1]
            example.prompt = turns[
                : len(turns) - (last["role"] == "assistant" and not last["content"])
            ]
            notes["HH-RLHF transcripts were read as messages"] += 1
        else:
            example.prompt = [{"role": "user", "content": example.prompt.strip()}]
            if not example.item:
                notes["plain text was wrapped into one user and one assistant message"] += 1
    elif isinstance(example.prompt, _Transcript):
        notes["HH-RLHF transcripts were read as messages"] += 1
        example.prompt = list(example.prompt)
    example.answers = [
        [{"role": "assistant", "content": answer.strip()}]
        if isinstance(answer, str)
        else list(answer)
        for answer in example.answers
    ]
    return example


def _as_text(example: Example, where: str) -> Example:
    """Keep text as it is; messages that were a transcript become one again."""
    if isinstance(example.prompt, _Transcript):
        example.prompt = example.prompt and example.prompt.text() + "\n\nAssistant:"
        example.answers = [
            answer.text().removeprefix("\n\nAssistant:")
            for answer in example.answers
            if isinstance(answer, _Transcript)
        ]
    if not all(isinstance(turns, str) for turns in (example.prompt, *example.answers)):
        raise TokenizerError(
            "the data holds messages, and the tokenizer has no chat template",
            where=where,
            expected="a tokenizer with a chat template, or columns of plain text",
            remedy="choose an instruct model, or turn the messages into text yourself",
        )
    return example
