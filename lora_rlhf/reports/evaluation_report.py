# SPDX-License-Identifier: Apache-2.0
"""Schema of an evaluation's `report.json`, version 1, and the reader that checks it.

The evaluation writes the file; pages and cards take their numbers from it and from nowhere else.
Keys that are not listed here are ignored, so that a later version 1 may add some.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lora_rlhf.errors import UsageError

VERSION = 1
FILE = "report.json"


class Part(BaseModel):
    """Base of all parts: types are strict, and NaN and infinities are errors."""

    model_config = ConfigDict(
        strict=True, allow_inf_nan=False, frozen=True, protected_namespaces=()
    )


class Interval(Part):
    """A number with its two-sided 95 % interval, if there is one, and its n."""

    value: float
    low: float | None
    high: float | None
    n: int
    p: float | None = None
    """Of the test that there is no difference."""
    p_corrected: float | None = None
    """The same, corrected for all comparisons of the report; none for the headline."""


Estimates = dict[str, Interval | None]


class Difference(Part):
    """Model `a` minus model `b`, paired by prompt."""

    a: str
    b: str
    estimate: Interval | None
    by_kind: Estimates
    detectable: float | None = None
    """True difference that this many prompts show in 8 of 10 evaluations."""


class Swap(Part):
    """A model's difference between the people of pairs of one kind."""

    target: str
    kind: str
    estimate: Interval | None


class Table(Part):
    """One metric on one prompt set: every model, every pair of models."""

    set: str
    metric: str
    meaning: str
    better: Literal["higher", "lower", "neither"]
    judge: str | None
    trusted: bool
    estimates: Estimates
    by_kind: dict[str, Estimates]
    differences: list[Difference]
    from_clean: Estimates = Field(default_factory=dict)
    """On changed prompts: the difference from the clean ones, paired by prompt."""
    swaps: list[Swap] = Field(default_factory=list)
    """On prompts about the other person of each pair: the difference, by kind of pair."""


class Suite(Part):
    """The suite and the settings of sampling."""

    name: str
    file: str
    seed: int
    temperature: float
    max_new_tokens: int


class Headline(Part):
    """The metric that was chosen beforehand, and its sentence."""

    metric: str
    set: str
    judge: str | None
    sentence: str


class Target(Part):
    """A model that was evaluated."""

    name: str
    kind: str
    base: str | None
    id: str | None
    few_shot: int


class PromptSetEntry(Part):
    """A prompt set, with the number of its prompts of each kind."""

    name: str
    n: int
    kinds: dict[str, int]
    source: str
    licence: str
    sha256: str


class Judge(Part):
    """A judge, with its record against people's labels, if it has one."""

    name: str
    kind: str
    validation: dict[str, Any] | None
    trusted: bool
    why: str


class Answer(Part):
    """One model's answer to one prompt, and its metrics; None: undecided, or does not apply."""

    text: str
    tokens: int | None
    finished: bool | None
    values: dict[str, float | None]


class Sample(Part):
    """A prompt with the answers of all models, and the reason to show it."""

    set: str
    id: str
    kind: str
    prompt: str
    answers: dict[str, Answer]
    why: str


class Cost(Part):
    """Time, memory and price of a model's answers; None: not measured."""

    p50_s: float | None
    p95_s: float | None
    tokens_per_second: float | None
    peak_bytes: float | None
    per_1000: float | None


class Gap(Part):
    """Something that was not measured, and the reason."""

    what: str
    why: str


class Report(Part):
    """A whole `report.json`."""

    version: Literal[1]
    suite: Suite
    created: str | None
    """None in a run, whose times are in the record."""
    packages: dict[str, str]
    device: str
    headline: Headline | None
    verdict: list[str]
    targets: list[Target] = Field(min_length=1)
    sets: list[PromptSetEntry]
    tables: list[Table]
    judges: list[Judge]
    samples: list[Sample]
    costs: dict[str, Cost]
    not_measured: list[Gap]
    seconds: dict[str, float] = Field(default_factory=dict)
    """Part of the evaluation -> its time."""

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        for kind, known, used in self._names():
            if unknown := sorted(used - known):
                raise ValueError(f"{kind} {unknown[0]!r} is used but not listed")
        return self

    def _names(self) -> Iterator[tuple[str, set[str], set[str]]]:
        """Yield each kind of name, its list, and the names that the rest of the report uses."""
        used = {*self.costs} | {name for sample in self.samples for name in sample.answers}
        for table in self.tables:
            used |= {*table.estimates, *table.from_clean} | {
                n for d in table.differences for n in (d.a, d.b)
            }
            used |= {name for row in table.by_kind.values() for name in row}
        yield "the target", {target.name for target in self.targets}, used
        placed: list[Table | Sample] = [*self.tables, *self.samples]
        yield "the set", {entry.name for entry in self.sets}, {item.set for item in placed}


PROBES = {
    "padded": "padded with empty sentences",
    "repeated": "repeated",
    "flattering": "after flattery",
    "prompt_copied": "after a copy of the prompt",
    "confidently_wrong": "that people rejected, in a confident tone,",
    "empty": "that is empty",
}
"""Probe of a judge -> the worse answer that it was shown beside the better one."""


def worst_probe(validation: dict[str, Any] | None) -> str | None:
    """Return the probe that a judge fails most often, as a sentence; None without probes."""
    probes = (validation or {}).get("probes") or {}
    if not probes:
        return None
    name = max(probes, key=lambda name: probes[name]["value"])
    value, low, high = (100 * probes[name][key] for key in ("value", "low", "high"))
    rate = f"{value:.0f} % [{low:.0f}, {high:.0f}]"
    return f"it prefers an answer {PROBES.get(name, name)} to the better one in {rate} of pairs"


def read(folder: Path) -> dict[str, Any]:
    """Read and check the report of an evaluation's folder.

    Raises:
        UsageError: There is no report, it is not JSON, or it is not of this version.
    """
    path = folder / FILE
    remedy = "give a run, or the --out of `lora-rlhf evaluate`"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        given = f"no {FILE}" if isinstance(error, FileNotFoundError) else str(error)
        raise UsageError(given, where=str(folder), remedy=remedy) from error
    except ValueError as error:  # not JSON, or not UTF-8
        line = getattr(error, "lineno", 1)
        raise UsageError(f"not JSON: {error}", where=f"{path}:{line}", remedy=remedy) from error
    checked(report, path)
    return dict(report)


def checked(report: Any, path: Path) -> Report:
    """Return the typed report.

    Args:
        report: The parsed JSON.
        path: Its file, for the error.

    Raises:
        UsageError: It is of another version, a key is missing, or a value has another type.
    """
    version = report.get("version") if isinstance(report, dict) else None
    if version != VERSION or isinstance(version, bool):
        raise UsageError(
            f"not a report of version {VERSION}: "
            + (f"version {version!r}" if isinstance(report, dict) else "no JSON object"),
            where=str(path),
            remedy="evaluate again, or use the lora-rlhf that wrote the file",
        )
    try:
        return Report.model_validate(report)
    except ValidationError as error:
        first, *others = error.errors(include_url=False)
        place = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in first["loc"])
        missing = first["type"] == "missing"
        parts = place.removeprefix("."), "missing" if missing else first["msg"]
        more = f" (and {len(others)} more faults)" if others else ""
        raise UsageError(
            ": ".join(part for part in parts if part) + more,
            where=str(path),
            expected=f"the keys of {FILE} version {VERSION}",
            remedy="evaluate again: the file was changed, or written by another version",
        ) from error
