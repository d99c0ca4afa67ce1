# SPDX-License-Identifier: Apache-2.0
"""Labels of a project in numbers: for the owner's page, and without names for record and cards."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_rlhf.data import sources
from lora_rlhf.data.label_pool import SUFFIX, Agreement, Pool
from lora_rlhf.errors import DataError
from lora_rlhf.recipe.schema import DataSource
from lora_rlhf.runs.disk import write_atomically

from . import agreement, labeler_verdicts
from .labeler_verdicts import SCREENING, Verdict
from .labels import Label, Task, check_value


def summary(
    tasks: Sequence[Task],
    labels: Sequence[Label],
    groups: Mapping[str, str | None],
    judges: Sequence[Label] = (),
    cut_offs: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Return what `agreement.html` shows, as plain JSON: with names, for the owner alone."""
    given = agreement.current(tasks, labels)
    verdicts = labeler_verdicts.judge_labelers(tasks, labels, judges, cut_offs)
    each = Counter(task.id for task, label in given if label.value is not None)
    ways = labeler_verdicts.consensus(tasks, labels)
    differ = [
        task
        for task in tasks
        if task.id in ways["majority"]
        and _opposite(task, *(ways[way][task.id] for way in ("majority", "model")))
    ]
    return {
        **agreement.measure(tasks, labels, {who: group or "" for who, group in groups.items()}),
        "verdicts": [_plain(verdict) for verdict in verdicts],
        "counts": {
            "labels": each.total(),
            "tasks": len(each),
            "people": len(verdicts),
            "several": sum(count > 1 for count in each.values()),
            "gold": sum(task.gold is not None for task in tasks),
        },
        "consensus": {
            "tasks": len(ways["majority"]),
            "differ": len(differ),
        },
        "cut_offs": {**SCREENING, **(cut_offs or {})},
        "fewest": agreement.FEWEST,
    }


def _opposite(task: Task, a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Tell if two values order some two answers oppositely, or give another overall quality."""
    if task.type == "rating":
        return bool(a != b)
    first, second = (agreement.comparisons(task, value) for value in (a, b))
    return any(first[pair] * second[pair] < 0 for pair in first)


def _plain(verdict: Verdict) -> dict[str, Any]:
    plain = asdict(verdict)
    plain["kinds"], plain["reasons"] = list(verdict.reasons), list(verdict.reasons.values())
    for name, part in verdict.screening.items():
        plain["screening"][name]["result"] = part.result
    return plain


def read_judge(path: Path, tasks: Sequence[Task]) -> list[Label]:
    """Read the rankings of an automatic judge: rows of `id` (and `set`), and `ranking`.

    A ranking lists model names, the best first; equally good ones are a list within it. The judge
    is called as the file, or as `labeler` says.

    Raises:
        DataError: A row is no ranking of a task's answers, with file and line; or none is of these
            tasks.
    """
    by_id = {task.id: task for task in tasks}
    read: list[Label] = []
    for where, row in sources.read(DataSource(path=str(path)), sources.Skips()):
        name = f"{row['set']}/{row.get('id')}" if row.get("set") else str(row.get("id"))
        task = by_id.get(name)
        if task is None or task.type not in ("ranking", "pair"):
            continue
        try:
            value = _ranked(task, row.get("ranking"))
        except (ValueError, TypeError) as error:
            raise DataError(
                f"not a ranking of the task's answers: {error}",
                where=where,
                expected='{"id": "1", "ranking": ["best model", ["tied", "tied"]]}',
            ) from None
        judge = str(row.get("labeler") or path.stem)
        order = tuple(range(len(task.answers)))
        read.append(Label(len(read), name, judge, value, (), False, "", order, 0.0, "", ""))
    if not read:
        raise DataError("no row is of a task of this project", where=str(path), expected="its ids")
    return read


def _ranked(task: Task, ranking: Any) -> dict[str, Any]:
    if not isinstance(ranking, list):
        raise ValueError(f"{ranking!r:.60} is not a list")
    places: dict[str, int] = {}
    for tied in ranking:
        rank = 1 + len(places)
        places |= dict.fromkeys(map(str, tied if isinstance(tied, list) else [tied]), rank)
    names = [answer.model for answer in task.answers]
    if {*places} != {*names}:
        raise ValueError(f"it names {', '.join(sorted(places))}; the task: {', '.join(names)}")
    ranks = [places[name] for name in names]
    if task.type == "pair":
        return {"strength": (ranks[0] > ranks[1]) - (ranks[0] < ranks[1])}
    return check_value(task.type, {"ranks": ranks}, len(names))


def describe(
    path: Path,
    used: Sequence[tuple[Task, Label]],
    tasks: Sequence[Task],
    labels: Sequence[Label],
    groups: Mapping[str, str | None],
    cut_offs: Mapping[str, float] | None = None,
) -> None:
    """Write the description of the people behind a file of labels beside it, without names.

    Args:
        used: The labels in the file. Agreement, screening and verdicts are of the people who gave
            them, on all that they labelled, gold items included.
    """
    people = {label.labeler for _, label in used}
    theirs = [label for label in labels if label.labeler in people]
    verdicts = labeler_verdicts.judge_labelers(tasks, labels, cut_offs=cut_offs)
    kept = [verdict for verdict in verdicts if verdict.labeler in people]
    screening: dict[str, Counter[str]] = {}
    for verdict in kept:
        for part, one in verdict.screening.items():
            screening.setdefault(part, Counter())[one.result] += 1
    parts = agreement.measure(tasks, theirs)["parts"]
    numbers = {key: {k: one[k] for k in Agreement.model_fields} for key, one in parts.items()}
    by_group = Counter(groups.get(who) for who in people)
    pool = Pool.model_validate(
        {
            "version": 1,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "people": len(people),
            "left_out": len(verdicts) - len(kept),
            "labels": len(used),
            "by_type": Counter(task.type for task, _ in used),
            "by_kind": Counter(task.kind or "(none)" for task, _ in used),
            "flags": Counter(flag for _, label in used for flag in label.flags),
            "guidelines": sorted({label.guidelines for _, label in used}),
            "agreement": numbers,
            "screening": screening,
            "verdicts": Counter(kind for verdict in kept for kind in verdict.reasons),
            "groups": {
                group: count
                for group, count in by_group.items()
                if group and count >= agreement.FEWEST
            },
        }
    )
    write_atomically(path.with_name(path.name + SUFFIX), json.dumps(pool.model_dump(), indent=1))
