# SPDX-License-Identifier: Apache-2.0
"""The page of an evaluation: `report.html`, one file that opens offline, made from `report.json`.

Tables and plots are in the HTML and need no script; the sample browser reads the samples from a
JSON block. Nothing of a model's answer is ever parsed as HTML: the template escapes, the script
writes text nodes, and the Content-Security-Policy allows the page's own script and style alone.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from lora_rlhf.redaction import safe
from lora_rlhf.runs.disk import write_atomically
from lora_rlhf.runs.record import Record

from .evaluation_report import (
    FILE,
    PROBES,
    Answer,
    Difference,
    Interval,
    Report,
    Sample,
    Table,
    checked,
    read,
)

NAME = "report.html"
_FOLDER = Path(__file__).with_name("page")

LARGEST = 3_000_000
"""Bytes of a page; browsers on a phone open it, and it can be attached to an issue."""

TEXT_LIMITS = (None, 8000, 4000, 2000, 1000, 500)
"""Characters of a text on the page, tried in this order; then prompts are left out."""

WIDTH = 240  # of a plot, in CSS pixels


def write(report: dict[str, Any], path: Path) -> None:
    """Write the page of a report (`report.json` version 1).

    Raises:
        UsageError: The report is of another version, or a key is missing.
    """
    write_atomically(path, render(report, path.with_name(FILE)))


def of_run(record: Record) -> Path:
    """Write the page of a run: its `report.json`, and the speed of its models from the clock.

    Raises:
        DamageError: `report.json` is not the file that the evaluation wrote.
        UsageError: There is none.
    """
    report, page = read(record.verified(FILE).parent), record.folder / NAME
    unknown = dict.fromkeys(("p50_s", "p95_s", "peak_bytes", "per_1000"))
    report["costs"] = {
        model: {**unknown, "tokens_per_second": speed["tokens_per_second"]}
        for model, speed in record.data["clock"].get("evaluation", {}).items()
    }
    write(report, page)
    return page


def render(report: dict[str, Any], source: Path) -> str:
    """Return the page as text; `source` is the report's file, for errors."""
    checked(report, source)  # before secrets are masked: an error names what is in the file
    typed = checked(safe(report), source)
    room = LARGEST - len(_encoded(_page(typed, "", ""))) - 1_000  # for the sentence on cuts
    return _encoded(_page(typed, *_samples(typed, room))).decode()


def _encoded(text: str) -> bytes:
    """Encode as UTF-8; half of a surrogate pair becomes its escape, which JSON reads back."""
    return text.encode("utf-8", "backslashreplace")


def _page(report: Report, samples: str, cuts: str) -> str:
    names = [target.name for target in report.targets]
    return fill(
        "report.html.j2",
        "report.js",
        report=report,
        samples=Markup(samples),
        cuts=cuts,
        headline=_headline(report),
        views=[_view(number, table, names) for number, table in enumerate(report.tables, 1)],
        names=names,
    )


def fill(template: str, script: str = "", **context: Any) -> str:
    """Return a page made from a template of `page/` with the house's style.

    Args:
        script: File of `page/` that alone may run; none by default.
        context: The names of the template.
    """
    style, code = (
        (_FOLDER / name).read_text(encoding="utf-8") if name else ""
        for name in ("report.css", script)
    )
    allowed = _hash(code) if script else "'none'"
    policy = (
        f"default-src 'none'; script-src {allowed}; style-src {_hash(style)}; "
        "img-src data:; base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'"
    )
    given = {"policy": policy, "style": style, "script": code}
    safe_here = {name: Markup(text) for name, text in given.items()}
    text = _environment().get_template(template).render(**safe_here, **context)
    return text.lstrip()  # of the blank lines between macros


@functools.cache
def _environment() -> jinja2.Environment:
    """Return the environment of all pages, which keeps compiled templates."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"shown": shown, "fields": fields, "plain": plain}
    environment.globals |= {"axis": Axis.of, "width": WIDTH, "probe_words": PROBES}
    return environment


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def _view(number: int, table: Table, names: Sequence[str]) -> dict[str, Any]:
    """Lay out a table: the rows of its models, of its differences, and of its kinds of prompt."""
    pairs = [(d, reading(d, table.better)) for d in table.differences]
    kinds = dict.fromkeys([*table.by_kind, *(kind for d, _ in pairs for kind in d.by_kind)])

    def row(kind: str) -> tuple[str, list[Interval | None], list[Interval | None]]:
        models = [table.by_kind.get(kind, {}).get(name) for name in names]
        return kind, models, [d.by_kind.get(kind) for d, _ in pairs]

    return {
        "id": f"m{number}",
        "table": table,
        "models": [(name, table.estimates.get(name), "") for name in names],
        "differences": [(f"{d.a} − {d.b}", d.estimate, text) for d, text in pairs],
        "from_clean": [_from_clean(*item, table.better) for item in table.from_clean.items()]
        + [
            (f"{s.target}: swapped − first, {s.kind}", s.estimate, _corrected(s.estimate))
            for s in table.swaps
        ],
        "kinds": [row(kind) for kind in kinds],
        "shown": [f"{text} than {d.b}" for d, text in pairs if text.startswith(f"{d.a} is")],
    }


def _corrected(estimate: Interval | None) -> str:
    p = estimate.p_corrected if estimate else None
    return "" if p is None else f"p {p:.2g}, corrected"


def _from_clean(name: str, estimate: Interval | None, better: str) -> tuple[str, Any, str]:
    """Return the row of a model's change from the clean prompts."""
    change = Difference(a=name, b="clean", estimate=estimate, by_kind={})
    return f"{name}: changed − clean", estimate, reading(change, better)


def _headline(report: Report) -> Table | None:
    """Return the table of the headline metric, if it has one."""
    wanted = report.headline
    for table in report.tables:
        if wanted and (table.metric, table.set, table.judge) == (
            wanted.metric,
            wanted.set,
            wanted.judge,
        ):
            return table
    return None


# --- samples -------------------------------------------------------------------------------------


def _samples(report: Report, room: int) -> tuple[str, str]:
    """Pack the samples into at most `room` bytes of JSON.

    Returns:
        The JSON, with `<` escaped, and a sentence on what was cut or left out.
    """
    metrics: dict[str, list[str]] = {}  # by set
    for sample in report.samples:
        known = metrics.setdefault(sample.set, [])
        for name in (name for answer in sample.answers.values() for name in answer.values):
            if name not in known:
                known.append(name)
    head = _json(_head(report, metrics))
    room -= len(_encoded(head)) + 20
    names = [target.name for target in report.targets]
    rows: list[str] = []
    for limit in TEXT_LIMITS:
        rows = [_json(_row(sample, names, metrics[sample.set], limit)) for sample in report.samples]
        sizes = [len(_encoded(row)) + 1 for row in rows]
        if sum(sizes) <= room:
            break
    kept = set()
    for number in _worst_first(report):
        if (room := room - sizes[number]) < 0:
            break
        kept.add(number)
    rows = [row for number, row in enumerate(rows) if number in kept]
    return f'{head[:-1]},"rows":[{",".join(rows)}]}}', _cuts(report, len(rows), limit)


def _json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _head(report: Report, metrics: dict[str, list[str]]) -> dict[str, Any]:
    start = _headline(report)
    return {
        "targets": [target.name for target in report.targets],
        "metrics": metrics,
        "better": {table.metric: table.better for table in reversed(report.tables)},
        "start": [start.set, start.metric] if start else None,
        "model": _subject(report),
        "total": len(report.samples),
    }


def _row(sample: Sample, names: Sequence[str], metrics: Sequence[str], limit: int | None) -> Any:
    """Return a sample as a list; a text is followed by the number of characters cut from it."""

    def cut(text: str) -> tuple[str, int]:
        return text[:limit], len(text) - len(text[:limit])

    def packed(answer: Answer | None) -> Any:
        if answer is None:
            return 0
        values = [answer.values.get(name) for name in metrics]
        return [*cut(answer.text), answer.tokens, answer.finished, values]

    answers = [packed(sample.answers.get(name)) for name in names]
    return [sample.set, sample.id, sample.kind, sample.why, *cut(sample.prompt), answers]


def _subject(report: Report) -> str:
    """Return the model that the report is about: the first of the headline's difference."""
    tables = [_headline(report), *report.tables]
    pairs = (difference.a for table in tables if table for difference in table.differences)
    return next(pairs, report.targets[-1].name)


def _worst_first(report: Report) -> list[int]:
    """Order the samples: the worst of every set, then the next of every set, and so on.

    The worst are those of the report's subject by the headline metric, or by its set's first one.
    """
    subject, headline = _subject(report), _headline(report)
    order: list[tuple[int, int]] = []
    for name in dict.fromkeys(sample.set for sample in report.samples):
        tables = [t for t in (headline, *report.tables) if t and t.set == name]
        sign = -1 if tables and tables[0].better == "lower" else 1

        def badness(number: int, tables: Sequence[Table] = tables, sign: int = sign) -> float:
            answer = report.samples[number].answers.get(subject)
            value = answer.values.get(tables[0].metric) if answer and tables else None
            return math.inf if value is None else sign * value

        numbers = [number for number, sample in enumerate(report.samples) if sample.set == name]
        order += enumerate(sorted(numbers, key=badness))
    return [number for _, number in sorted(order, key=lambda pair: pair[0])]


def _cuts(report: Report, kept: int, limit: int | None) -> str:
    """Say what of the samples is not on the page; empty if all is."""
    parts = []
    if limit is not None:
        parts.append(f"texts of more than {limit:,} characters are cut there")
    if absent := len(report.samples) - kept:
        parts.append(
            f"{absent:,} of {len(report.samples):,} prompts are left out, those with the best "
            f"answers of {_subject(report)}"
        )
    size = f"To keep this page under {LARGEST / 1e6:g} MB, "
    return f"{size}{' and '.join(parts)}. {FILE} has everything." if parts else ""


# --- numbers -------------------------------------------------------------------------------------


def plain(value: float | None, digits: int = 4) -> str:
    """Format a number with about four significant digits; None is a dash."""
    if value is None:
        return "–"
    places = 0 if not value else max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{min(places, 9)}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text).replace("-", "−")


def shown(estimate: Interval) -> tuple[str, str, str]:
    """Format value, low and high to two digits of the interval's half width, or more.

    Low and high are empty where there is no interval.
    """
    low, high = estimate.low, estimate.high
    if low is None or high is None:
        return plain(estimate.value), "", ""
    half = (high - low) / 2
    places = min(max(1 - math.floor(math.log10(half)), 0), 9) if half > 0 else 3
    while places < 9 and any(x and not round(x, places) for x in (low, high)):
        places += 1  # the sign of an end decides what a difference shows

    def text(x: float) -> str:
        return f"{round(x, places) + 0.0:,.{places}f}".replace("-", "−")

    return text(estimate.value), text(low), text(high)


def reading(difference: Difference, better: str) -> str:
    """Say in words what a difference and its interval show."""
    estimate = difference.estimate
    if estimate is None or estimate.low is None or estimate.high is None:
        return "not known"
    p = estimate.p if estimate.p_corrected is None else estimate.p_corrected
    if estimate.low <= 0 <= estimate.high or (p is not None and p >= 0.05):
        least = difference.detectable
        corrected = "" if estimate.low <= 0 <= estimate.high else " after correction"
        could = f"; {plain(least, 2)} would be, in 8 of 10 evaluations" if least else ""
        return f"no difference shown{corrected}{could}"
    higher = estimate.low > 0
    if better == "neither":
        return f"{difference.a} is {'higher' if higher else 'lower'}"
    return f"{difference.a} is {'better' if higher == (better == 'higher') else 'worse'}"


def fields(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a judge's validation with their names; an estimate is one leaf."""
    parts = {"value", "low", "high", "n"}
    if isinstance(value, dict) and parts - {"n"} <= value.keys():
        estimate = Interval(**{"n": 0, **{key: value[key] for key in parts & value.keys()}})
        number, low, high = shown(estimate)
        n = f" (n = {estimate.n:,})" if estimate.n else ""
        yield name, number + (f" [{low}, {high}]" if low else "") + n
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from fields(item, f"{name}, {key}" if name else str(key))
    elif isinstance(value, bool) or value is None:
        yield name, {True: "yes", False: "no", None: "not known"}[value]
    else:
        yield name, plain(value) if isinstance(value, int | float) else str(value)


@dataclass(frozen=True)
class Axis:
    """The horizontal axis that the plots of one table share, with round ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]

    @classmethod
    def of(cls, estimates: Iterable[Interval | None], zero: bool = False) -> Axis | None:
        """Return an axis that holds all intervals (and 0), or None if there is no estimate."""
        known = [e for e in estimates if e]
        ends = [x for e in known for x in (e.value, e.low, e.high) if x is not None]
        if not ends:
            return None
        low, high = min([*ends, 0] if zero else ends), max([*ends, 0] if zero else ends)
        if high - low <= 1e-9 * max(abs(low), abs(high)):
            low, high = low - 0.5, high + 0.5
        raw = (high - low) / 3
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        ticks = tuple(round(n * step, 12) for n in range(first, last + 1))
        return cls(ticks[0], ticks[-1], ticks)

    def x(self, value: float) -> float:
        """Return the position of a value, in pixels from the left of the plot."""
        return round(16 + (WIDTH - 32) * (value - self.low) / (self.high - self.low), 1)
