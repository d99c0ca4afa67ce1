# SPDX-License-Identifier: Apache-2.0
"""Stop at an unread column that looks like a part of the prompt or judges the answers.

Training without it would not train on what the rows mean.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from lora_rlhf.errors import DataError
from lora_rlhf.recipe.schema import DataSource

from .sources import Row, excerpt

PARTS = {
    "prompt": ("instruction", "question", "query", "problem"),
    "input": (
        "input",
        "context",
        "passage",
        "document",
        "documents",
        "background",
        "history",
        "article",
        "kontext",
    ),
    "system": ("system", "system_prompt", "system_message", "persona"),
}
"""Our column -> usual names of columns that hold this part of the prompt."""

_NO_COLUMN = ("tools", "functions", "tool_calls", "images", "image", "thinking", "reasoning",
              "reasoning_content", "chain_of_thought", "cot", "rationale", "choices",
              "options")  # fmt: skip
_JUDGES = frozenset(
    "label labels score scores rating ratings reward rewards grade grades stars vote votes upvotes "
    "downvotes likes dislikes thumb thumbs correct quality preference preferred winner verdict "
    "accepted approved rank ranks ranking toxic toxicity safe harmful helpful helpfulness "
    "choice better best annotator annotators "
    "correctness coherence honesty harmlessness "
    "kto desirable undesirable good bad liked disliked flagged incorrect wrong unsafe upvote "
    "downvote weight weights".split()
)
_FATES = frozenset(
    "deleted removed discarded spam truncated error errors failed failure passed invalid valid "
    "hallucinated hallucination exclude excluded include included skip skipped keep drop "
    "dropped".split()
)
"""Words of columns that judge the answers too, if only `_AROUND` is beside them."""

_BAD = frozenset(
    "dislikes downvotes downvote disliked toxic toxicity harmful undesirable bad flagged incorrect "
    "wrong unsafe deleted removed discarded spam truncated error errors failed failure invalid "
    "hallucinated hallucination exclude excluded skip skipped drop dropped".split()
)
"""Words of columns whose true means that the answer is bad."""

_TOLD_APART = (
    ("good", "bad"), ("accepted", "rejected"), ("approved", "rejected"), ("correct", "incorrect"),
    ("correct", "wrong"), ("right", "wrong"), ("pass", "fail"), ("passed", "failed"),
    ("desirable", "undesirable"), ("like", "dislike"), ("liked", "disliked"), ("👍", "👎"),
    ("thumbs up", "thumbs down"), ("thumbs_up", "thumbs_down"), ("chosen", "rejected"),
    ("gut", "schlecht"), ("richtig", "falsch"), ("valid", "invalid"), ("ok", "error"),
    ("success", "error"), ("success", "failure"), ("completed", "failed"), ("keep", "drop"),
    ("submitted", "discarded"), ("stop", "length"), ("end_turn", "max_tokens"),
)  # fmt: skip
"""Words of which a column with both judges the answers, whatever its name is."""

_MOST_KINDS = 5
_HELD_OUT = frozenset("test validation valid val dev eval evaluation holdout heldout".split())
_OF_A_TURN = ("role", "content", "from", "value", "name", "tool_calls", "weight", "train",
              "training", "loss", "mask", "masked")  # fmt: skip
"""Keys of a turn that are read, or refused, where it is read."""

_KEPT_OUT = _HELD_OUT - {"valid"} | {"train", "training", "held"}
"""Words of columns that say by true and false which rows are not to train on."""

_AROUND = frozenset(
    "is was are has to be should in for from of on only not out set split data row sample example "
    "answer response completion generation output message turn text reason status type code flag "
    "model test tests training used".split()
)
"""Words beside them with which a column is still about its row: `is_test`, but no `n_train`."""

_ANSWERS = ("completion", "messages", "chosen", "rejected", "completions")
_LABELS = {
    **dict.fromkeys(("true", "1", "1.0", "+1", "up", "yes", "positive"), True),
    **dict.fromkeys(("false", "0", "-1", "0.0", "-1.0", "down", "no", "negative"), False),
    **{good: True for good, _ in _TOLD_APART}, **{bad: False for _, bad in _TOLD_APART},
}  # fmt: skip


def label(value: Any) -> bool | None:
    """Return the judgement of a label: true or false, also as 1 and 0 (or -1), or thumbs."""
    return _LABELS.get(str(value).strip().lower())


def number(value: Any) -> float | None:
    """Return a finite number, also one that is written as text, as in a CSV; None for another."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        read = float(value)
    except (ValueError, OverflowError):
        return None
    return read if math.isfinite(read) else None


class Problem(NamedTuple):
    """An unread column, the mapping that would read it (empty if none would), and the error."""

    column: str
    columns: dict[str, str]
    error: DataError


def check(rows: list[Row], layout: tuple[str, ...], name: str, source: DataSource) -> None:
    """Check the columns of a source that its layout does not read.

    Raises:
        DataError: One of them looks needed, judges the answers, or contradicts the layout.
    """
    for problem in problems(rows, layout, name, source):
        raise problem.error


def problems(
    rows: list[Row], layout: tuple[str, ...], name: str, source: DataSource
) -> Iterator[Problem]:
    """Yield the unread columns that look needed, judge the answers, or contradict the layout."""
    read = {*layout, "labeler", "user", "item", "system"}
    if layout != ("messages",):
        read |= {"input"}
    if "chosen" in layout:
        read |= {"prompt", "margin"}
    if "ranks" in layout:
        read |= {"scores"}  # compared with the ranks
    if name == "demonstrations":
        read |= {"tools"} | ({"label"} & source.columns.keys())
    values: dict[str, list[Any]] = {}
    for _, row in rows:
        for column, value in _cells(row):
            if column not in (*read, *source.ignore) and value not in (None, "", [], {}):
                values.setdefault(column, []).append(value)
    for column, given in values.items():
        if problem := _part(rows, column, given, layout, source):
            yield problem
        elif name in ("demonstrations", "comparisons") and column not in _ANSWERS:
            yield from filter(None, [_judgement(rows, column, given, name, source)])
    theirs = source.columns.get("ranks", "")
    if "ranks" in layout and _words(theirs) & _JUDGES - {"rank", "ranks", "ranking"}:
        columns = _mapped(source, "scores", theirs, without="ranks")
        error = DataError(
            f"the column {theirs!r} is read as ranks, of which 1 is the best",
            where=rows[0][0],
            expected="ranks; of scores the highest is the best",
            remedy=f"for scores: {_written(columns)}; if it really holds ranks, rename it in the "
            "file",
        )
        yield Problem(theirs, columns, error)


def _cells(row: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield name and value of each column, of one that holds named values those, and of a turn.

    The last turn of `messages` may carry a judgement, such as `rating`.
    """
    for column, value in row.items():
        if not isinstance(column, str):
            continue
        yield column, value
        if isinstance(value, dict) and column not in _ANSWERS:
            yield from ((f"{column}.{key}", one) for key, one in value.items())
        if column == "messages" and isinstance(value, list):
            last = value[-1] if value and isinstance(value[-1], dict) else {}
            more = (key for key in last if key not in _OF_A_TURN)
            yield from ((f"messages.{key}", last[key]) for key in more)


def _part(
    rows: list[Row], column: str, given: list[Any], layout: tuple[str, ...], source: DataSource
) -> Problem | None:
    """Describe a column that looks like a part of the prompt; None for another."""
    # A pair of texts without a prompt: the prompt may be in any other column of texts.
    bare = "chosen" in layout and not any(row.get("prompt") for _, row in rows)
    bare = bare and all(isinstance(row.get("chosen"), str) for _, row in rows)
    ours = next((ours for ours, names in PARTS.items() if column.lower() in names), "")
    if bare and isinstance(given[0], str) and column not in _ANSWERS:
        ours = "prompt" if len(set(given)) > 1 and not _words(column) & {"id"} else ours
    if not ours and column.lower() not in _NO_COLUMN:
        return None
    prompts = [str(row.get("prompt") or row.get("messages")) for _, row in rows if row.get(column)]
    if all(_said(value, prompt) for value, prompt in zip(given, prompts, strict=False)):
        return None  # nothing is lost: the prompt says it too
    remedy = "write what it says into the prompt or the answers, as the model should see it"
    if ours == "prompt" and "prompt" in source.columns.keys() | {
        key for _, row in rows[:1] for key in row
    }:
        ours = "input"
    columns = {}
    if ours and isinstance(given[0], str) and layout != ("messages",):
        columns = _mapped(source, ours, column)
        remedy = _written(columns)
    error = DataError(
        f"the column {column!r} is not read, and looks like a part of the prompt or the answer: "
        f"{len(given)} of {len(rows)} rows have one, such as {excerpt(given[0])}",
        where=rows[0][0],
        expected="columns whose content is trained on, or left out on purpose",
        remedy=f"{remedy}; to train without it: `ignore: [{column}]`",
    )
    return Problem(column, columns, error)


def _said(value: Any, prompt: str) -> bool:
    """Tell if a prompt holds a value, or each value of a list."""
    values = value if isinstance(value, list) and value else [value]
    return all(str(one).strip() in prompt for one in values)


def _judgement(
    rows: list[Row], column: str, given: list[Any], name: str, source: DataSource
) -> Problem | None:
    """Describe a column that says how good the answers are, or what they are for; else None."""
    words = {str(value).strip().lower() for value in given}
    if _of_row(column, _KEPT_OUT) and len(words) > 1 and all(label(v) is not None for v in given):
        return _split(rows, column, given)
    if words & _HELD_OUT and words <= _HELD_OUT | {"train", "training"} and len(words) > 1:
        return _split(rows, column, given)
    told_apart = len(words) <= _MOST_KINDS and any(words >= {*pair} for pair in _TOLD_APART)
    few = len(words) <= _MOST_KINDS or len(given) < len(rows)
    fate = few and _of_row(column, _FATES)
    if not (_words(column) & _JUDGES or fate or told_apart):
        return None
    if _words(column) & {"chosen", "rejected"}:
        return _pair(rows, column)
    kinds = Counter(excerpt(value, 30) for value in given)
    if _words(column) & {"annotator", "annotators"} and not (
        len(kinds) <= _MOST_KINDS and all(isinstance(value, int | float) for value in given)
    ):
        return None  # names of people, not what they said
    bad = bool(_words(column) & _BAD)
    if len(kinds) == 1 and len(given) == len(rows) and label(given[0]) is not bad:
        return None  # it judges no row apart from the others, and none of them as bad
    columns: dict[str, str] = {}
    remedy = "leave in the file what the model should learn, such as the answers judged good"
    if name == "comparisons":
        remedy = "give the better answer as `chosen`, and leave out pairs that should not count"
    clear = column in rows[0][1] and not bad  # a label may be made of it
    if name == "demonstrations" and clear and all(label(value) is not None for value in given):
        columns = _mapped(source, "label", column)
        remedy = f"{_written(columns)} trains on the answers judged good only, "
        remedy += "and under data.comparisons pairs the good and bad answers to a prompt"
    shown = ", ".join(f"{value}: {n}" for value, n in kinds.most_common(3))
    error = DataError(
        f"the column {column!r} is not read, and judges the answers ({shown})",
        where=rows[0][0],
        expected="judgements that are used, or left out on purpose",
        remedy=f"{remedy}; to train on all: `ignore: [{column}]`",
    )
    return Problem(column, columns, error)


def _split(rows: list[Row], column: str, given: list[Any]) -> Problem:
    """Describe a column that says which rows are not to train on."""
    shown = ", ".join(f"{value}: {n}" for value, n in Counter(map(str, given)).most_common(4))
    error = DataError(
        f"the column {column!r} is not read, and keeps rows out of training ({shown})",
        where=rows[0][0],
        expected="a file of rows to train on; those to evaluate on are another file",
        remedy="write the rows of each kind into a file of their own, those to evaluate on for "
        f"data.evaluate; to train on all: `ignore: [{column}]`",
    )
    return Problem(column, {}, error)


def _pair(rows: list[Row], column: str) -> Problem | None:
    """Describe scores of pairs that prefer the rejected answer."""
    other = column.replace("chosen", "rejected")
    turned = [
        where
        for where, row in rows
        if (a := number(row.get(column))) is not None
        and (b := number(row.get(other))) is not None
        and a < b
    ]
    if not turned:
        return None
    error = DataError(
        f"{len(turned)} of {len(rows)} rows have a {column} below their {other}",
        where=turned[0],
        expected="a chosen answer that is the better one by the file's own scores",
        remedy="take these rows out or swap their answers; if the scores mean something else: "
        f"`ignore: [{column}]`",
    )
    return Problem(column, {}, error)


def _of_row(column: str, about: frozenset[str]) -> bool:
    """Tell if a name has one of these words, and none that makes it about something else."""
    words = _words(column.rpartition(".")[2])
    return bool(words & about) and words <= about | _AROUND


def _words(column: str) -> set[str]:
    return set(re.findall("[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", column).lower()))


def _mapped(source: DataSource, ours: str, theirs: str, without: str = "") -> dict[str, str]:
    return {k: v for k, v in source.columns.items() if k != without} | {ours: theirs}


def _written(columns: dict[str, str]) -> str:
    return f"`columns: {{{', '.join(f'{a}: {b}' for a, b in columns.items())}}}`"
