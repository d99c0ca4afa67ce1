# SPDX-License-Identifier: Apache-2.0
"""The report of a sweep: its failed runs, the settings over the seeds, and their differences."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console

from lora_rlhf.errors import counted
from lora_rlhf.estimates import differs

from . import tables
from .cards import card_markdown


def failures(report: Mapping[str, Any]) -> Iterator[str]:
    """Name every run that is not finished, with its error."""
    for run in report["runs"]:
        if run["state"] != "done":
            yield f"{run['setting']}, seed {run['seed']}: {run['error']}"


def show(report: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the comparison of the settings, and the runs that failed."""
    console = console or Console(highlight=False)
    if report["comparison"]:
        tables.show_comparison(report["comparison"], console)
    if wrong := list(failures(report)):
        tables.say(console, f"\n{len(wrong)} of {counted(len(report['runs']), 'run')} failed:")
        for line in wrong:
            tables.say(console, line)


def markdown(report: Mapping[str, Any]) -> str:
    """Return the report as `sweep.md`."""
    wrong, runs = list(failures(report)), report["runs"]
    parts = ["# Sweep", f"Finished: {len(runs) - len(wrong)} of {counted(len(runs), 'run')}."]
    if wrong:
        parts += ["## Failed runs", card_markdown.bullets(map(card_markdown.cell, wrong))]
    if comparison := report["comparison"]:
        parts += _results(comparison)
    return "\n\n".join(parts) + "\n"


def _results(comparison: Mapping[str, Any]) -> Iterator[str]:
    yield "## Settings"
    table = tables.rows({row["label"]: row["metrics"] for row in comparison["rows"]})
    yield _table(*table) + "\n\nBrackets hold the 95 % interval; n is the number of observations."
    if given := comparison["differences"]:
        yield f"## {given[0]['metric'].replace('_', ' ')} less that of {given[0]['less']}"
        yield _table(["setting", "difference", "corrected p", ""], map(_difference, given))
        by_kind = tables.differences_by_kind(given)
        if by_kind[1]:
            yield "By kind of prompt; `*` marks what is clear after correction for their number:"
            yield _table(*by_kind)
    yield card_markdown.bullets(map(card_markdown.cell, comparison["notes"]))


def _difference(one: Mapping[str, Any]) -> list[str]:
    estimate = one["estimate"]
    if estimate is None:
        why = card_markdown.cell(one["why_not"])
        return [one["of"], f"not comparable: {why}", "", ""]
    p = estimate.get("p_corrected", estimate.get("p"))
    verdict = ("no clear difference", "clearly better", "clearly worse")[differs(estimate)]
    return [
        one["of"],
        tables.cell(estimate, difference=True),
        "" if p is None else f"{p:.2g}",
        verdict,
    ]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Make a Markdown table; names are foreign text, numbers are ours."""
    named = ([card_markdown.cell(first), *rest] for first, *rest in rows)
    return card_markdown.table([card_markdown.cell(text) for text in head], named)
