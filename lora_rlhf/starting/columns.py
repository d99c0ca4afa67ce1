# SPDX-License-Identifier: Apache-2.0
"""Each column of a user's file: the part of an example that it is used for, and the reason."""

from __future__ import annotations

import ast
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_rlhf.data import row_formats, unread_columns
from lora_rlhf.data.row_formats import LAYOUTS, Example
from lora_rlhf.data.sources import Row, Skips, excerpt, read
from lora_rlhf.errors import DataError, counted
from lora_rlhf.recipe.schema import COLUMNS, DataSource

Ask = Callable[[str, Sequence[str], str], str]
"""(question, allowed answers or empty, default) -> the answer."""

SETS = ("comparisons", "demonstrations", "prompts")
_MOST_BROKEN = 0.2
_FEWEST_PAIRS = 20
_LONGEST_NAME = 60  # characters; a longer name is a row of data
_WAYS = {
    "named": "named so in the file",
    "name": "by its name",
    "user": "as you said",
    "content": "a guess by its content",
}


@dataclass(eq=False)
class Taken:
    """A source, the sets that it can serve, and its columns.

    Attributes:
        sources: Set -> the source as that set reads it.
        examples: Set -> its parsed examples, None for broken rows.
        columns: Column -> (what it is taken for, or "ignored"; why).
        notes: Sentences for the user.
    """

    name: str
    rows: list[Row]
    sources: dict[str, DataSource] = field(default_factory=dict)
    examples: dict[str, list[Example]] = field(default_factory=dict)
    columns: dict[str, tuple[str, str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Say what the source is taken for, column by column."""
        sets = ", ".join(name for name in SETS if name in self.sources)
        width = max([len(_cell(name)) for name in self.columns] + [6])
        table = [("column", "taken for", "why"), *((c, *v) for c, v in self.columns.items())]
        return [
            f"{self.name}: {counted(len(self.rows), 'row')}; serves as {sets}",
            *(f"  {_cell(column):{width}}  {role:12}  {why}" for column, role, why in table),
            *(f"  {note}" for note in self.notes),
        ]


def _cell(name: str) -> str:
    return excerpt(name, 40)


def look(
    source: DataSource, *, given: Mapping[str, str], ignore: Sequence[str], ask: Ask | None
) -> Taken:
    """Read a source and decide what its columns are.

    Args:
        given: Columns that the user named, ours -> theirs.
        ignore: Columns that the user wants to leave unread.
        ask: Asks the user; None: the likely answer is taken, and noted.

    Raises:
        DataError: It cannot be read, or no set can be made of its columns.
    """
    skips = Skips(10**9)
    try:
        rows = read(source, skips)
    except DataError as error:  # no rows: the first broken one says more
        raise (skips.seen or [error])[0] from None
    name = source.hub or Path(source.path or "").name
    if len(skips.seen) > _MOST_BROKEN * (len(rows) + len(skips.seen)):
        raise skips.seen[0]
    taken = Taken(name, rows)
    names = list(dict.fromkeys(str(key) for _, row in rows for key in row))
    _check_header(source, names)
    mine = {ours: theirs for ours, theirs in given.items() if theirs in names}
    source = source.model_copy(
        update={"skip_bad": len(skips.seen), "ignore": [c for c in ignore if c in names]}
    )
    ways = dict.fromkeys(mine.values(), "user")
    _take(taken, source, mine, ways, ask)
    known = [name for name, (role, _) in taken.columns.items() if role != "ignored"]
    left = [n for n in names if n not in (*ignore, *known) and _is_prose(rows, n)]
    if not taken.sources or ([*taken.sources] == ["prompts"] and left):
        texts = names == ["text"]  # of documents, not prompts
        guess = {} if texts else _by_content(rows, [n for n in names if n not in ignore], ask)
        ways |= dict.fromkeys([*guess.values()], "user" if ask else "content")
        if guess:
            _take(taken, source, guess | mine, ways, ask)
        if not guess or not taken.sources:
            raise _unknown(taken, names)
    if skips.seen:
        first = skips.seen[0]
        what = f"left out (skip_bad), the first at {_place(first.where)}"
        taken.notes.append(f"{counted(len(skips.seen), 'broken row')} {what}: {first.given}")
    return taken


def _place(where: str) -> str:
    return where.rpartition(os.sep)[2]


def _check_header(source: DataSource, names: list[str]) -> None:
    """Refuse a CSV whose first row is not a header."""
    long = [n for n in names if len(n) > _LONGEST_NAME or n.rstrip().endswith("?")]
    if long and re.search(r"\.[ct]sv(\.gz)?$", str(source.path), re.IGNORECASE):
        raise DataError(
            f"the first line is not a header, but data: {excerpt(long[0])}",
            where=f"{source.path}:1",
            expected="names of the columns in the first line, such as prompt,completion",
            remedy="add a line with their names",
        )


def _take(
    taken: Taken, source: DataSource, mine: Mapping[str, str], ways: dict[str, str], ask: Ask | None
) -> None:
    """Find the sets that the rows can serve with this mapping and the usual names."""
    for name in SETS:
        for layout in LAYOUTS[name]:
            made = _source_for(taken.rows, source, name, layout, mine)
            made = made and _decided(taken, made, name, layout, ways, ask)
            if made is None:
                continue
            parsed, notes = _parsed(taken.rows, made, name)
            bad = sum(one is None for one in parsed)
            if bad > _MOST_BROKEN * len(parsed):
                continue
            taken.sources[name] = made.model_copy(update={"skip_bad": made.skip_bad + bad})
            taken.examples[name] = [one for one in parsed if one is not None]
            taken.notes += [note for note in notes if note not in taken.notes]
            if bad:
                taken.notes.append(f"{counted(bad, 'row')} of {name} left out (skip_bad): no fit")
            if layout[-1] == "label" and not _paired(taken, name):
                continue
            source = source.model_copy(update={"ignore": made.ignore})  # asked once
            break
    _describe(taken, ways)


def _paired(taken: Taken, name: str) -> bool:
    """Tell whether enough prompts have answers of both kinds to make comparisons."""
    kinds: dict[str, set[bool]] = {}
    for one in taken.examples[name]:
        kinds.setdefault(str(one.prompt), set()).add(one.good)
    both = sum(len(each) == 2 for each in kinds.values())
    if both < _FEWEST_PAIRS:
        taken.notes.append(
            f"{both} of {len(kinds)} prompts have both a good and a bad answer, too few to compare "
            f"(at least {_FEWEST_PAIRS}): only the good answers are trained on"
        )
        del taken.sources[name], taken.examples[name]
    return both >= _FEWEST_PAIRS


def _source_for(
    rows: list[Row],
    source: DataSource,
    name: str,
    layout: tuple[str, ...],
    mine: Mapping[str, str],
) -> DataSource | None:
    """Return the source with the columns of a layout, or None if it lacks one."""
    seen = row_formats.unfolded(_renamed(rows, mine), set(source.ignore), Counter())
    columns = list(dict.fromkeys(str(key) for _, row in seen for key in row))
    guess = row_formats.mapping(columns, layout, seen)
    if guess is None:
        return None
    own = {key for _, row in rows for key in row} | mine.keys()
    if any(theirs not in own for theirs in guess.values()):  # such as UltraFeedback's
        return None
    kept = {a: b for a, b in mine.items() if a in (*layout, "prompt", "input", "system", "margin")}
    if name == "demonstrations" and (label := mine.get("label")):
        kept["label"] = label
    return source.model_copy(update={"columns": guess | kept})


def _renamed(rows: list[Row], columns: Mapping[str, str]) -> list[Row]:
    """Rename columns as `sources.read` does."""
    theirs = set(columns.values())
    return [
        (
            where,
            {k: v for k, v in row.items() if k not in theirs}
            | {ours: row[name] for ours, name in columns.items() if name in row},
        )
        for where, row in rows
    ]


def _decided(
    taken: Taken,
    source: DataSource,
    name: str,
    layout: tuple[str, ...],
    ways: dict[str, str],
    ask: Ask | None,
) -> DataSource | None:
    """Decide on the columns that look needed and are not read: map, ignore, or ask.

    None: the layout leaves out what another one reads.
    """
    for _ in range(len(COLUMNS)):
        seen = _renamed(taken.rows, source.columns)
        seen = row_formats.unfolded(seen, set(source.ignore), Counter())
        problem = next(unread_columns.problems(seen, layout, name, source), None)
        if problem is None:
            return source
        column = problem.column
        mapped = [ours for ours, theirs in problem.columns.items() if theirs == column]
        if mapped and not set(mapped) & source.columns.keys():
            by_name = any(column.lower() in names for names in unread_columns.PARTS.values())
            ways.setdefault(column, "name" if by_name or mapped == ["label"] else "content")
            source = source.model_copy(update={"columns": problem.columns})
            continue
        if "below their" in problem.error.given:
            raise problem.error
        question = f"{problem.error.where}: {problem.error.given}; leave it out?"
        if ask and name != "prompts" and ask(question, ("yes", "no"), "yes") == "no":
            raise problem.error
        if name != "prompts":
            note = problem.error.given.replace("is not read, and", "is left out, though it")
            taken.notes += [note] * (note not in taken.notes)
        source = source.model_copy(update={"ignore": [*source.ignore, column]})
    return None


def _parsed(
    rows: list[Row], source: DataSource, name: str
) -> tuple[list[Example | None], list[str]]:
    notes: Counter[str] = Counter()
    renamed = _renamed(rows, source.columns)
    try:
        parsed = row_formats.examples(renamed, name, True, notes, Skips(10**9), source)
    except DataError:  # another layout may fit
        return [None], []
    wrapped = "plain text was wrapped"
    return parsed, [
        f"{note} ({counted(n, 'row')})" for note, n in notes.items() if not note.startswith(wrapped)
    ]


def _describe(taken: Taken, ways: Mapping[str, str]) -> None:
    """Write down each column's part in the examples."""
    names = list(dict.fromkeys(str(key) for _, row in taken.rows for key in row))
    read_as: dict[str, str] = {}
    for name in SETS:
        if (source := taken.sources.get(name)) is None:
            continue
        theirs = {b: a for a, b in source.columns.items()}
        head = _renamed(taken.rows[:50], source.columns)
        seen = row_formats.unfolded(head, set(source.ignore), Counter())
        layout = next((la for la in LAYOUTS[name] if _has(seen, source, la)), ())
        used = {*layout, "input", "system", "labeler", "user", "margin"}
        used |= {"prompt"} if "chosen" in layout else set()
        used |= {"tools"} if name == "demonstrations" else set()
        for column in names:
            if column in theirs:
                read_as.setdefault(column, theirs[column])
            elif column in used:
                read_as.setdefault(column, column)
        before, after = head[0][1], seen[0][1]
        for ours in after.keys() - before.keys():  # made of a column with a name of its own
            made = [c for c in before if before[c] == after[ours] or c == "conversations"]
            read_as |= dict.fromkeys(made[:1], ours)
    for column in names:
        role = read_as.get(column)
        way = ways.get(column, "named" if role == column else "name")
        taken.columns[column] = (role, _WAYS[way]) if role else ("ignored", _ignored(taken, column))


def _has(rows: list[Row], source: DataSource, layout: tuple[str, ...]) -> bool:
    present = {k for _, row in rows for k in row} | source.columns.keys()
    return present.issuperset(layout)


def _ignored(taken: Taken, column: str) -> str:
    values = [row.get(column) for _, row in taken.rows if row.get(column) not in (None, "")]
    return f"not used; a value: {excerpt(values[0], 30)}" if values else "it is empty"


# --- by content ----------------------------------------------------------------------------------


_WORSE = re.compile("bad|wors|wrong|reject|lose|schlecht|peor", re.IGNORECASE)
"""What the name of a column of worse answers may contain."""


def _by_content(rows: list[Row], names: list[str], ask: Ask | None) -> dict[str, str]:
    """Guess which columns hold the prompt and the answer, or ask for them."""
    texts = [name for name in names if _is_prose(rows, name)]
    turns = [name for name in names if name not in texts and _is_turns(rows, name)]
    if len(turns) == 1:
        return {"messages": turns[0]}
    if not texts:
        return {}
    texts.sort(key=lambda name: (-_questions(rows, name), _length(rows, name)))
    if ask is None:
        return dict(zip(("prompt", "completion"), texts, strict=False)) if len(texts) < 3 else {}
    shown = ", ".join(f"{_cell(n)} ({excerpt(str(rows[0][1].get(n)), 40)})" for n in texts)
    none = "none"
    taken: dict[str, str] = {}
    for ours, question in (
        ("prompt", f"columns of text: {shown}\nwhich is the question or instruction?"),
        ("completion", "which is the answer, or the better of two answers?"),
        ("rejected", "which is the worse answer?"),
    ):
        left = [name for name in texts if name not in taken.values()]
        if left and (ours != "rejected" or "completion" in taken):
            better = next((name for name in left if not _WORSE.search(name)), left[0])
            answer = ask(question, (*left, none), none if ours == "rejected" else better)
            taken |= {ours: answer} if answer != none else {}
    if "rejected" in taken:
        taken["chosen"] = taken.pop("completion")
    return taken


def _values(rows: list[Row], name: str) -> list[Any]:
    given = (row.get(name) for _, row in rows[:500])
    return [value for value in given if value not in (None, "")]


def _is_prose(rows: list[Row], name: str) -> bool:
    """Tell texts of several words, mostly different ones, from categories, numbers and ids."""
    values = _values(rows, name)
    texts = [v for v in values if isinstance(v, str)]
    several = [t for t in texts if len(t.split()) > 1]
    return (
        bool(values)
        and 2 * len(several) > len(values)
        and (4 * len(set(texts)) > len(texts) or _are_replies(set(texts)))
        and not _is_turns(rows, name)
    )


def _are_replies(texts: set[str]) -> bool:
    """Tell answers that repeat, as a support desk's do, from categories."""
    return len(texts) > 9 and sum(len(text.split()) for text in texts) > 4 * len(texts)


def _is_turns(rows: list[Row], name: str) -> bool:
    values = _values(rows, name)[:20]
    read = [_literal(v) if isinstance(v, str) and v.lstrip()[:1] == "[" else v for v in values]
    return bool(read) and all(isinstance(v, list) and v and isinstance(v[0], dict) for v in read)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return text


def _questions(rows: list[Row], name: str) -> float:
    texts = [v for v in _values(rows, name) if isinstance(v, str)]
    return round(sum("?" in text for text in texts) / max(len(texts), 1), 1)


def _length(rows: list[Row], name: str) -> float:
    texts = [v for v in _values(rows, name) if isinstance(v, str)]
    return sum(map(len, texts)) / max(len(texts), 1)


def _unknown(taken: Taken, names: list[str]) -> DataError:
    first = taken.rows[0][1]
    shown = "".join(f"\n  {_cell(name)}: {excerpt(str(first.get(name)), 60)}" for name in names)
    if names == ["text"]:
        return DataError(
            f"{taken.name} holds plain text only",
            expected="prompts with answers, or pairs of answers",
            remedy="split each text into `prompt` and `completion`; plain text itself serves as "
            "data.text, beside other data",
        )
    return DataError(
        f"the columns of {taken.name} cannot be told apart{shown}",
        where=taken.rows[0][0],
        expected="a prompt and its answer, a better and a worse answer, or messages",
        remedy="name them: `--column prompt=THEIRS --column completion=THEIRS`, or `--column "
        "chosen=THEIRS --column rejected=THEIRS` for pairs; where a column names the better one of "
        "two, write chosen and rejected by it first",
    )


def plain(source: DataSource) -> dict[str, Any]:
    """Return a source as the plain data of a recipe."""
    return {key: getattr(source, key) for key in source.changed(*type(source).model_fields)}
