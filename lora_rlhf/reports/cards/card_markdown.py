# SPDX-License-Identifier: Apache-2.0
"""Markdown for cards: numbers, intervals, tables, and text from untrusted sources."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MISSING = "not recorded"
CUT = " … [cut]"
_MAX_CHARS = 400

# Characters with a meaning in Markdown, HTML or a table become entities, because renderers differ
# in their backslash escapes. `@`, `://` and `www.` would become mentions and links.
_ENTITIES = {ord(char): f"&#{ord(char)};" for char in "&<>|`*[]\\~$#@"}
# Invisible, direction-changing and control characters are shown by their code, because they can
# make a text look like another.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)
_ABSOLUTE = re.compile(r"(?:~?/|[A-Za-z]:[\\/])[^\n]*")
_EMBEDDED = re.compile(r"(?<![\w/:.])(?:~?/(?:[\w.@+-]+/)+|[A-Za-z]:\\(?:[^\\\s\"']+\\)+)")


def at(data: Any, path: str, default: Any = None) -> Any:
    """Return the value at `a.b.c` in nested dicts, or `default` if a key is missing or null."""
    for key in path.split("."):
        data = data.get(key) if isinstance(data, Mapping) else None
    return default if data is None else data


def is_number(value: Any) -> bool:
    """True for a finite number; NaN and infinities are text in the record."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any) -> str:
    """Format a number with four significant digits, an integer with all; other values as text."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if str(value).lower() in ("nan", "inf", "-inf"):
        return "not finite"
    if not is_number(value):
        return cell(value)
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def interval(value: Any, short: bool = False) -> str:
    """Format `{value, low, high, n}`; a missing interval is mentioned unless `short`."""
    if isinstance(value, Mapping) and value.get("n") == 0 and is_number(value.get("value")):
        return f"{number(value['value'])} (bound)"  # from a formula, not from samples
    if not isinstance(value, Mapping):
        bare = value is None or short
        return number(value) if bare else f"{number(value)} (no interval recorded)"
    shown = number(value.get("value"))
    bounds = [value.get("low"), value.get("high")]
    if all(is_number(bound) for bound in bounds):
        low, high = (number(bound) for bound in bounds)
        shown += f" [{low}, {high}]" if short else f" (95 % interval {low} to {high}"
    else:
        shown += "" if short else " (no interval recorded"
    shown += f", n = {number(value['n'])}" if value.get("n") is not None else ""
    return shown if short else shown + ")"


def cell(value: Any, limit: int = _MAX_CHARS) -> str:
    """Escape any text for use within a line: no markup, line breaks or invisible characters."""
    text = str(value)
    if len(text) > limit:
        text = text[:limit].rstrip() + CUT
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = _UNSEEN.sub(lambda match: f"[U+{ord(match[0]):04X}]", text)
    text = re.sub(r"(?<!\w)_|_(?!\w)", "\x00", text)  # no markup inside a word
    text = (
        text.translate(_ENTITIES)
        .replace("\x00", "&#95;")
        .replace("://", "&#58;//")
        .replace("www.", "www&#46;")
    )
    return re.sub(r"\s*\n\s*", " ⏎ ", text.strip()).replace("\t", " ")


def paragraph(value: Any) -> str:
    """Clean a paragraph by the author: Markdown without HTML, pictures, headings or fences."""
    text = _UNSEEN.sub("", str(value)).replace("<", "&lt;").replace("![", "&#33;[").strip()
    return re.sub(r"(?m)^\s*(`{3,}|~{3,}|-{3,}|#+)", "", text)


def code(value: Any) -> str:
    """Format an identifier as inline code."""
    if value is None:
        return MISSING
    return "`" + re.sub(r"[`<>|\s]+", " ", _UNSEEN.sub("", relative(str(value)))).strip() + "`"


def one_line(data: Any) -> Any:
    """Put every text in the data on one line, without invisible characters."""
    if isinstance(data, Mapping):
        return {one_line(key): one_line(item) for key, item in data.items()}
    if isinstance(data, list | tuple):
        return [one_line(item) for item in data]
    return " ".join(_UNSEEN.sub("", data).split()) if isinstance(data, str) else data


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Make a Markdown table of escaped cells."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def bullets(items: Iterable[str]) -> str:
    """Make a Markdown list."""
    return "\n".join(f"- {item}" for item in items)


def relative(text: str) -> str:
    """Remove the folders of absolute local paths, so that only file names remain."""
    if _ABSOLUTE.fullmatch(text):
        return re.split(r"[\\/]", text.rstrip("\\/"))[-1]
    return _EMBEDDED.sub("", text)


def without_paths(data: Any) -> Any:
    """Apply `relative` to every text in the data, keys included."""
    if isinstance(data, str):
        return relative(data)
    if isinstance(data, Mapping):
        return {relative(str(key)): without_paths(item) for key, item in data.items()}
    if isinstance(data, list | tuple):
        return [without_paths(item) for item in data]
    return data
