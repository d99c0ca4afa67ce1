# SPDX-License-Identifier: Apache-2.0
"""`agreement.html`: agreement of labelers and a verdict on each, one file that opens offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_rlhf.redaction import safe
from lora_rlhf.runs.disk import write_atomically

from .evaluation_report import Interval
from .html_report import fill

NAME = "agreement.html"

_TITLES = {
    "comparisons": "Which of two answers is better",
    "rating": "Overall quality",
    "questions": "Yes/no questions on an answer",
    "flags": "Flags",
}


def write(summary: dict[str, Any], path: Path) -> None:
    """Write the page of a project's labels.

    Args:
        summary: As `feedback.label_summary.summary` returns it: plain JSON.
    """
    write_atomically(path, render(summary))


def render(summary: dict[str, Any]) -> str:
    """Return the page as text."""
    given = _typed(safe(summary))
    named = [one for one in given["verdicts"] if one["reasons"]]
    lead = _lead(len(named), len(given["verdicts"]))
    parts = [(_TITLES[part], numbers) for part, numbers in given.pop("parts").items()]
    text = fill("agreement.html.j2", lead=lead, named=named, parts=parts, **given)
    return text.encode("utf-8", "backslashreplace").decode()


def lines(summary: dict[str, Any]) -> list[str]:
    """Return the verdicts as lines for a terminal."""
    verdicts = safe(summary)["verdicts"]
    named = [(one["labeler"], reason) for one in verdicts for reason in one["reasons"]]
    lead = _lead(len({who for who, _ in named}), len(verdicts))
    return [lead, *(f"  {who}: {reason}" for who, reason in named)]


def _lead(named: int, people: int) -> str:
    if named:
        return f"{named} of {people} labelers should be looked at before their labels are used."
    if people > 1:
        return f"Nothing speaks against any of the {people} labelers."
    return "There are no labels of several people yet, so there is nobody to compare with."


def _typed(value: Any) -> Any:
    """Return the value with its estimates as intervals, as the templates expect them."""
    if isinstance(value, list):
        return [_typed(one) for one in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"value", "low", "high", "n"}:
        return Interval(**value)
    return {key: _typed(one) for key, one in value.items()}
