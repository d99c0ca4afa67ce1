# SPDX-License-Identifier: Apache-2.0
"""Runs, comparisons, plans and the progress of a run in a cell of Jupyter or Colab.

`register` is called when the package is imported in a notebook; the rest runs when one is shown.
"""

from __future__ import annotations

import base64
import html
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from lora_rlhf.redaction import printable, safe
from lora_rlhf.runs.progress import Progress
from lora_rlhf.runs.record import Record

from . import tables

_SECONDS = 1.0
"""Least time between two updates of a cell, which the browser has to draw."""

_LINES = 200
"""Lines of a run that a cell keeps."""

_POINTS = 200


def shell() -> Any:
    """Return the notebook that this process is the kernel of; None outside of one."""
    module = sys.modules.get("IPython")
    running = module.get_ipython() if module is not None else None
    return running if running is not None and hasattr(running, "kernel") else None


def register(plan: str) -> None:
    """Teach the notebook, if there is one, to show our objects.

    Args:
        plan: Module of the plan's report, which is above this room.
    """
    if (running := shell()) is None:
        return
    formatter = running.display_formatter.formatters["text/html"]
    formatter.for_type_by_name("lora_rlhf.runs.record", "Record", record_html)
    formatter.for_type_by_name("lora_rlhf.reports.compare", "Comparison", comparison_html)
    formatter.for_type_by_name(plan, "Report", plan_html)


def record_html(record: Record) -> str:
    """Return a run as HTML: its sentence, its table and its plots."""
    evaluation = record.data["evaluation"]
    parts = [f"<p><b>{_text(record.data.get('name', 'run'))}</b> in {_text(record.folder)}</p>"]
    if evaluation and record.done("evaluate"):
        parts.append(f"<p>{_text(tables.verdict(record)[0])}</p>")
        parts.append(_table(*tables.rows(evaluation)))
    else:
        stages = record.data["stages"].items()
        states = ", ".join(f"{name} {entry['status']}" for name, entry in stages)
        parts.append(f"<p>{_text(states or 'no stage begun')}</p>")
    for path in sorted(record.folder.glob("plots/*.png")):
        data = base64.b64encode(path.read_bytes()).decode()
        image = f'<img alt="{_text(path.stem)}" src="data:image/png;base64,{data}">'
        parts.append(f"<details><summary>{_text(path.stem)}</summary>{image}</details>")
    return "\n".join(parts)


def comparison_html(report: Mapping[str, Any]) -> str:
    """Return a comparison of runs as HTML: its table, its differences and its notes."""
    header, rows = tables.rows({row["label"]: row["metrics"] for row in report["rows"]})
    lines = [*tables.differences(report["differences"]), *report["notes"]]
    return _table(header, rows) + "".join(f"<p>{_text(line)}</p>" for line in lines)


def plan_html(report: Any) -> str:
    """Return a plan of the memory as HTML."""
    return f"<pre>{_text(report.as_text())}</pre>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _text(value: Any) -> str:
    return html.escape(printable(safe(str(value))))


class CellProgress(Progress):
    """The progress of a run in one place of a cell: a bar, its line, curves, and earlier lines."""

    def __init__(self) -> None:
        super().__init__()
        self._display = sys.modules["IPython"].display
        self._handle: Any = None
        self._lines: list[str] = []
        self._curves: dict[str, list[float]] = {}
        self._drawn = 0.0

    def say(self, text: str) -> None:
        """Keep a line; the last ones can be unfolded."""
        self._lines = [*self._lines, text][-_LINES:]
        self._draw(now=True)

    def begin(self, stage: str, total: int, first: int = 0) -> None:
        """Start a training, with curves of its own."""
        super().begin(stage, total, first)
        self._curves = {}
        self._draw(now=True)

    def step(self, step: int, metrics: dict[str, Any]) -> None:
        """Draw a finished step, and its main metrics as curves."""
        self.quiet, before = True, self.quiet  # its plain lines are not for a cell
        super().step(step, metrics)
        self.quiet = before
        for name, value in self._shown.items():
            if name in metrics:
                self._curves.setdefault(name, []).append(value)
        self._draw(now=step >= self.total)

    def end(self) -> None:
        """Draw the last step."""
        self._draw(now=True)
        super().end()

    def _refresh(self) -> None:
        self._draw()

    def _draw(self, now: bool = False) -> None:
        if not now and time.monotonic() - self._drawn < _SECONDS:
            return
        self._drawn = time.monotonic()
        shown = self._display.HTML(self.html())
        if self._handle is None:
            self._handle = self._display.display(shown, display_id=True)
        else:
            self._handle.update(shown)

    def html(self) -> str:
        """Return what the cell shows now."""
        parts = []
        if self.stage:
            share = self.step_count / max(self.total, 1)
            parts.append(f'<progress value="{share:.3f}" max="1"></progress> ')
            parts.append(f"<code>{_text(self._line().plain)}</code><br>")
            parts += [_curve(name, values) for name, values in self._curves.items()]
        if self._lines:
            older = "<br>".join(map(_text, self._lines))
            last = _text(self._lines[-1])
            parts.append(f"<details><summary>{last}</summary>{older}</details>")
        return "".join(parts)


def _curve(name: str, values: Sequence[float]) -> str:
    """Return a line of the values as SVG, with its name, its first and its last value."""
    step = max(1, len(values) // _POINTS)
    points = list(values[::step])
    if len(points) < 2:
        return ""
    low, high = min(points), max(points)
    scale = 40 / (high - low) if high > low else 0.0
    across = 180 / (len(points) - 1)
    line = " ".join(f"{i * across:.1f},{42 - (v - low) * scale:.1f}" for i, v in enumerate(points))
    title = f"{_text(name)} {values[0]:.3g} → {values[-1]:.3g}"
    return (
        f'<figure style="display:inline-block;margin:4px"><svg width="180" height="44">'
        f'<polyline fill="none" stroke="currentColor" points="{line}"/></svg>'
        f"<figcaption><small>{title}</small></figcaption></figure>"
    )


def progress() -> Progress:
    """Return the progress for where this process runs: a cell of a notebook, or a console."""
    return CellProgress() if shell() is not None else Progress()
