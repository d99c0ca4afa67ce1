# SPDX-License-Identifier: Apache-2.0
"""Agreement of labelers: raw with its interval, Krippendorff's alpha, Kendall's tau.

Two answers of a task are one question, whose verdict is -1 (the task's earlier one is better), 0
(a tie) or 1; a ranking of K answers gives K (K - 1) / 2 verdicts. The overall quality in a rating,
each of its yes/no questions, and each flag are questions too. A person's last label of a task
counts.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from lora_rlhf import extras
from lora_rlhf.estimates import Estimate, mean_interval, share_interval

from .labels import FLAGS, QUESTIONS, Label, Task

FEWEST = 5
"""People of a self-described group below which nothing is shown of it."""

SCALES = {"comparisons": "nominal", "rating": "ordinal", "questions": "nominal", "flags": "nominal"}
"""Part of the report -> level of measurement of alpha."""


@dataclass(frozen=True)
class Vote:
    """One labeler's answer to one question, which others may answer too."""

    task: str
    question: str
    labeler: str
    value: int
    prompt: str
    kind: str = ""


def current(tasks: Iterable[Task], labels: Iterable[Label]) -> list[tuple[Task, Label]]:
    """Return each labeler's last label of each of these tasks, by id; skipped ones are included."""
    known = {task.id: task for task in tasks}
    last = {(label.task, label.labeler): label for label in sorted(labels, key=lambda one: one.id)}
    return [(known[one.task], one) for one in last.values() if one.task in known]


def comparisons(task: Task, value: Mapping[str, Any] | None) -> dict[tuple[int, int], int]:
    """Return the verdict on each two answers of a ranking or a pair: -1, 0, or 1 for the later."""
    if value is None:
        return {}
    if task.type == "pair":
        return {(0, 1): int(np.sign(value["strength"]))}
    if task.type != "ranking":
        return {}
    ranks = value["ranks"]
    pairs = itertools.combinations(range(len(ranks)), 2)
    return {(a, b): int(np.sign(ranks[a] - ranks[b])) for a, b in pairs}


def votes(tasks: Iterable[Task], labels: Iterable[Label]) -> dict[str, list[Vote]]:
    """Return all votes by the part of the report that they belong to (see `SCALES`)."""
    made: dict[str, list[Vote]] = {part: [] for part in SCALES}
    for task, label in current(tasks, labels):
        prompt = json.dumps(task.prompt, sort_keys=True)

        def add(part: str, question: str, value: int, t: Task = task, p: str = prompt) -> None:
            made[part].append(Vote(t.id, question, label.labeler, value, p, t.kind))  # noqa: B023

        for pair, verdict in comparisons(task, label.value).items():
            add("comparisons", f"{pair[0]}-{pair[1]}", verdict)
        if task.type == "rating" and label.value is not None:
            add("rating", "overall", int(label.value["overall"]))
            for key in QUESTIONS:
                add("questions", key, int(label.value["questions"].get(key, False)))
        for flag in FLAGS:
            add("flags", flag, int(flag in label.flags))
    return made


def raw(cast: Sequence[Vote], ties: bool = True) -> Estimate | None:
    """Return the share of questions on which two people agree, clustered by prompt.

    Every two people who answered the same question are one outcome. Without `ties`, those in which
    one of them gave 0 are left out, as for a recipe's comparisons. None without any outcome.
    """
    same: list[bool] = []
    prompts: list[str] = []
    for given in _questions(cast):
        values = [(vote.value, vote.labeler) for vote in given if ties or vote.value]
        for (a, _), (b, _) in itertools.combinations(values, 2):
            same.append(a == b)
            prompts.append(given[0].prompt)
    return share_interval(same, prompts) if same else None


def alpha(cast: Sequence[Vote], level: str) -> float | None:
    """Return Krippendorff's alpha, by the library of that name.

    None if no question has two answers, or all answers are the same: then it is not defined.
    """
    values = sorted({vote.value for vote in cast})
    place = {value: number for number, value in enumerate(values)}
    rows = [[place[vote.value] for vote in given] for given in _questions(cast) if len(given) > 1]
    counts = np.array([np.bincount(row, minlength=len(values)) for row in rows])
    if not rows or (counts.sum(axis=0) > 0).sum() < 2:
        return None
    library = extras.load("krippendorff", "the agreement of labelers", "feedback")
    return float(
        library.alpha(value_counts=counts, value_domain=values, level_of_measurement=level)
    )


def kendall(cast: Sequence[Vote]) -> Estimate | None:
    """Return the mean of Kendall's tau-b between two people's rankings of the same task.

    Clustered by prompt. A ranking without any order (all answers tied) has no tau.
    """
    taus: list[float] = []
    prompts: list[str] = []
    for given in _grouped(cast, lambda vote: vote.task):
        people: dict[str, dict[str, int]] = {}
        for vote in given:
            people.setdefault(vote.labeler, {})[vote.question] = vote.value
        for a, b in itertools.combinations(people.values(), 2):
            tau = tau_b([a[q] for q in a if q in b], [b[q] for q in a if q in b])
            if tau is not None:
                taus.append(tau)
                prompts.append(given[0].prompt)
    return mean_interval(taus, prompts) if taus else None


def tau_b(a: ArrayLike, b: ArrayLike) -> float | None:
    """Return Kendall's tau-b of two rankings, given as the verdict (-1, 0, 1) on each pair."""
    first, second = np.sign(a), np.sign(b)
    decided = float((first != 0).sum()) * float((second != 0).sum())
    return float(first @ second) / decided**0.5 if decided else None


def tau_of_ratings(cast: Sequence[Vote]) -> Estimate | None:
    """Return the mean, over two people, of Kendall's tau-b of their ratings of common answers."""
    people: dict[str, dict[tuple[str, str], int]] = {}
    for vote in cast:
        people.setdefault(vote.labeler, {})[vote.task, vote.question] = vote.value
    taus = []
    for a, b in itertools.combinations(people.values(), 2):
        common = np.array([(a[key], b[key]) for key in a if key in b]).reshape(-1, 2)
        above = np.triu_indices(len(common), 1)
        first, second = (np.subtract.outer(x, x)[above] for x in common.T)
        taus.append(tau_b(first, second))
    known = [tau for tau in taus if tau is not None]
    return mean_interval(known) if known else None


def measure(
    tasks: Sequence[Task], labels: Sequence[Label], groups: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Measure how people agree: over all, by kind of prompt, and by self-described group.

    Args:
        groups: Labeler -> what they said of themselves; may lack some.

    Returns:
        Plain JSON without names: `parts` of `SCALES` with `raw`, `alpha`, `kendall`, the people as
        `labelers`, the `questions` with two answers or more, `by_kind` and `by_group`. A group of
        which fewer than `FEWEST` people share questions is left out; `groups_hidden` counts these.
    """
    cast, group_of = votes(tasks, labels), groups or {}
    known = sorted({group for group in group_of.values() if group})
    report: dict[str, Any] = {}
    hidden: set[str] = set()
    for part, level in SCALES.items():
        silent = part == "flags" and not any(vote.value for vote in cast[part])
        if silent or not (numbers := _numbers(part, cast[part], level)):
            continue
        kinds = {
            (given[0].kind or "(none)"): _numbers(part, given, level)
            for given in _grouped(cast[part], lambda vote: vote.kind)
        }
        by_group: dict[str, Any] = {}
        for group in known:
            mine = [vote for vote in cast[part] if group_of.get(vote.labeler) == group]
            inside = _numbers(part, mine, level)
            if inside and inside["labelers"] >= FEWEST:
                by_group[group] = inside
            elif mine:
                hidden.add(group)
        numbers["by_kind"] = {kind: one for kind, one in sorted(kinds.items()) if one}
        numbers["by_group"] = by_group
        by_question = _grouped(cast[part], lambda vote: vote.question) * (part != "comparisons")
        numbers["by_question"] = {
            given[0].question: one
            for given in by_question
            if len(by_question) > 1 and (one := _numbers(part, given, level))
        }
        report[part] = numbers
    shown = {group for numbers in report.values() for group in numbers["by_group"]}
    return {"parts": report, "groups_hidden": len(hidden - shown)}


def _numbers(part: str, cast: Sequence[Vote], level: str) -> dict[str, Any] | None:
    """Measure one slice; None if no question of it was answered twice."""
    share = raw(cast, ties=part != "comparisons")
    several = [given for given in _questions(cast) if len(given) > 1]
    if not several:
        return None
    taus = {"comparisons": kendall, "rating": tau_of_ratings}.get(part)
    return {
        "raw": share,
        "alpha": alpha(cast, level),
        "kendall": taus(cast) if taus else None,
        "labelers": len({vote.labeler for given in several for vote in given}),
        "questions": len(several),
    }


def _questions(cast: Sequence[Vote]) -> list[list[Vote]]:
    return _grouped(cast, lambda vote: (vote.task, vote.question))


def _grouped(cast: Sequence[Vote], key: Any) -> list[list[Vote]]:
    groups: dict[Any, list[Vote]] = {}
    for vote in cast:
        groups.setdefault(key(vote), []).append(vote)
    return list(groups.values())
