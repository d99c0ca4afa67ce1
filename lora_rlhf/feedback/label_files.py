# SPDX-License-Identifier: Apache-2.0
"""Tasks from JSON Lines, and labels as the files that recipes, `evaluate` and `judge` read."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_rlhf.data import answer_format, sources
from lora_rlhf.errors import DataError, UsageError, counted
from lora_rlhf.recipe.schema import DataSource
from lora_rlhf.runs.disk import make_place, write_atomically

from . import label_summary
from .labeler_verdicts import consensus
from .labels import (
    ANSWERS,
    FLAGS,
    TYPES,
    Answer,
    Label,
    Task,
    check_text,
    check_value,
    personal,
)

FIELDS = (
    "id", "set", "type", "prompt", "answers", "kind", "why", "gold", "checks", "round", "ranking",
)  # fmt: skip
"""Fields of a task file."""

_EXPECTED = '{"id": "1", "prompt": "…", "answers": {"model": "…", "other": "…"}}'
_ROLES = ("system", "user", "assistant")

NOTHING = "no label can be written as"
"""Beginning of the error for an export without rows."""

Given = tuple[Task, Label]
Rows = Iterator[dict[str, Any]]


# -------------------------------------------------------------------------------- tasks


def read_tasks(path: str | Path, kind: str = "ranking") -> list[Task]:
    """Read tasks, such as the `to_label.jsonl` of an evaluation.

    Args:
        kind: Type of tasks that name none and have answers for it; without answers they are
            demonstrations, with one answer ratings.

    Raises:
        DataError: A row is no task, with file and line.
    """
    read: dict[str, tuple[str, Task]] = {}
    for where, row in sources.read(DataSource(path=str(path)), sources.Skips()):
        try:
            task = _task(row, kind)
            if task.id in read and read[task.id][1] != task:
                raise ValueError(f"the id {task.id!r:.60} is also that of {read[task.id][0]}")
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(
                f"not a task: {error}",
                where=where,
                expected=_EXPECTED,
                remedy="correct the row; docs/feedback.md describes task files",
            ) from None
        read.setdefault(task.id, (where, task))
    return [task for _, task in read.values()]


def _task(row: dict[str, Any], kind: str) -> Task:
    if unknown := [key for key in row if key not in FIELDS]:
        raise ValueError(f"unknown field {unknown[0]!r:.60}; known: {', '.join(FIELDS)}")
    if row.get("ranking") is not None:
        raise ValueError("it has a ranking already")
    check_text(json.dumps(row, ensure_ascii=False))
    answers = _answers(row.get("answers"))
    kind = _type(row.get("type"), kind, len(answers))
    gold, checks = row.get("gold"), row.get("checks")
    if gold is not None:
        gold = _gold(kind, gold, len(answers))
    if checks is not None:
        answer_format.validate(checks)
    number = row.get("round", 0)
    if not isinstance(number, int):
        raise ValueError(f"round {number!r:.40}: expected a whole number")
    about, why, group = (row.get(key) or "" for key in ("kind", "why", "set"))
    if not all(isinstance(text, str) for text in (about, why, group)):
        raise ValueError("kind, why and set: expected texts")
    name = _id(row) if not group else f"{group}/{_id(row)}"
    prompt = _prompt(row.get("prompt"))
    return Task(name, kind, prompt, answers, about, why, gold, checks, number, group)


def _gold(kind: str, gold: Any, answers: int) -> dict[str, Any]:
    """Check the right value of a task; it may also hold the right `flags`, for screening."""
    if not isinstance(gold, dict) or "flags" not in gold:
        return check_value(kind, gold, answers)
    flags = gold["flags"]
    if not isinstance(flags, list) or not {*map(str, flags)} <= {*FLAGS}:
        raise ValueError(f"flags {flags!r:.60} of gold: expected a list of {', '.join(FLAGS)}")
    rest = {key: gold[key] for key in gold if key != "flags"}
    return {**check_value(kind, rest, answers), "flags": flags}


def _id(row: dict[str, Any]) -> str:
    name = row.get("id")
    if name is None:
        content = json.dumps({key: row[key] for key in row if key != "ranking"}, sort_keys=True)
        name = hashlib.sha256(content.encode()).hexdigest()[:12]
    if not isinstance(name, str | int) or not str(name).strip():
        raise ValueError(f"id {name!r:.40}: expected a text")
    return str(name)


def _type(given: Any, default: str, answers: int) -> str:
    if given is None:
        by_count = {0: "demonstration", 1: "rating"}.get(answers, "ranking")
        low, high = ANSWERS[default]
        given = default if low <= answers <= high else by_count
    if given not in TYPES:
        raise ValueError(f"type {given!r:.40}: expected one of {', '.join(TYPES)}")
    low, high = ANSWERS[given]
    if not low <= answers <= high:
        many = f"{low}" if low == high else f"{low} to {high}"
        raise ValueError(f"{answers} answers: a {given} has {many}")
    return str(given)


def _prompt(given: Any) -> tuple[dict[str, str], ...]:
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise ValueError(f"prompt {given!r:.60}: expected a text or turns")
    for turn in given:
        if not isinstance(turn, dict) or {*turn} != {"role", "content"}:
            raise ValueError(f"turn {turn!r:.60} of the prompt: expected role and content")
        if turn["role"] not in _ROLES or not isinstance(turn["content"], str):
            raise ValueError(
                f"role {turn['role']!r:.40}: expected {', '.join(_ROLES)}, with a text"
            )
    if given[-1]["role"] != "user" or not given[-1]["content"].strip():
        raise ValueError("the prompt does not end with a text of the user")
    return tuple({"role": turn["role"], "content": turn["content"]} for turn in given)


def _answers(given: Any) -> tuple[Answer, ...]:
    if given is None:
        return ()
    if not isinstance(given, dict) or not all(isinstance(text, str) for text in given.values()):
        raise ValueError(f"answers {given!r:.60}: expected model names with texts")
    return tuple(Answer(model, text) for model, text in given.items())


# ------------------------------------------------------------------------------- labels


def export(
    tasks: Iterable[Task],
    labels: Iterable[Label],
    path: Path,
    form: str | None = None,
    without: Collection[str] = (),
    groups: Mapping[str, str | None] | None = None,
    cut_offs: Mapping[str, float] | None = None,
) -> str:
    """Write current labels as JSON Lines; returns a sentence on what was written and left out.

    Beside the file, `FILE.labels.json` describes the labelers in counts, for record and card.

    Labels of gold items, of skipped tasks, and of tasks that someone flagged as broken or as
    holding personal data are left out; so are comparisons in which all answers are tied.

    Args:
        form: One of `FORMS`; default: demonstrations if there are no others, else comparisons.
        without: Labelers whose labels are left out.
        groups, cut_offs: As in `label_summary.describe`.

    Raises:
        UsageError: No such form, or no such labeler.
        DataError: A label is of another task, or nothing would be written.
    """
    tasks, labels = list(tasks), list(labels)
    given, lost = _given(tasks, labels, without)
    if form is None:
        only = bool(given) and all(task.type == "demonstration" for task, _ in given)
        form = "demonstrations" if only else "comparisons"
    if form not in FORMS:
        raise UsageError(f"there is no form {form!r}", expected=", ".join(FORMS))
    types, write = FORMS[form]
    fitting = [one for one in given if one[0].type in types]
    lost["of another type"] += len(given) - len(fitting)
    useless = [(_useless(form, *one), one) for one in fitting]
    lost.update(reason for reason, _ in useless if reason)
    fitting = [one for reason, one in useless if not reason]
    make_place(path)
    rows = _alike(list(write(fitting)))
    left = "; left out: " + ", ".join(f"{n} {why}" for why, n in lost.items() if n)
    left = left if any(lost.values()) else ""
    if not rows:
        raise DataError(
            f"{NOTHING} {form}{left}" if labels else f"{NOTHING} {form}: there are no labels yet",
            where=str(path),
            expected=f"labels of: {', '.join(types)}",
            remedy="" if labels else "let people label first: lora-rlhf label PROJECT",
        )
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    label_summary.describe(path, fitting, tasks, labels, groups or {}, cut_offs)
    return (
        f"{path}: {counted(len(rows), 'row')} ({form}) from {counted(len(fitting), 'label')}{left}"
    )


def _useless(form: str, task: Task, label: Label) -> str:
    """Return the reason for which a label makes no row of this form, or an empty text."""
    if form == "rankings" and not task.set:
        return "of no evaluation (the task has no set)"
    if form == "comparisons" and task.type in _COMPARED and len({*ranks(task, label)}) == 1:
        return "with all answers tied"
    return ""


def _given(
    tasks: Iterable[Task], labels: Iterable[Label], without: Collection[str]
) -> tuple[list[Given], Counter[str]]:
    """Return the labels to use, each with its task, and count those left out by reason."""
    by_id, labels = {task.id: task for task in tasks}, list(labels)
    if unknown := {*without} - {label.labeler for label in labels}:
        raise UsageError(f"there is no label by {min(unknown)!r}", remedy="check --without")
    unusable = personal(by_id.values(), labels) | {
        label.task for label in labels if "broken" in label.flags
    }
    lost: Counter[str] = Counter()
    given = []
    for label in labels:
        task = by_id.get(label.task)
        if task is None:
            raise DataError(
                f"label {label.id} is of the task {label.task!r}, which is not in the project",
                expected="labels of these tasks",
            )
        if label.value is None:
            lost["skipped"] += 1
        elif task.gold is not None:
            lost["of gold items"] += 1
        elif task.id in unusable:
            lost["flagged as broken or personal data"] += 1
        elif label.labeler in without:
            lost["by labelers left out"] += 1
        else:
            given.append((task, label))
    return given, lost


def _alike(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give all prompts as turns if some are, since a file has one layout."""
    if all(isinstance(row.get("prompt", ""), str) and "messages" not in row for row in rows):
        return rows
    made = []
    for row in rows:
        if isinstance(row.get("prompt"), str):
            turns = [{"role": "user", "content": row["prompt"]}]
            rest = {key: value for key, value in row.items() if key not in ("prompt", "completion")}
            if "completion" in row:
                last = {"role": "assistant", "content": row["completion"]}
                row = {"messages": [*turns, last], **rest}
            else:
                row = {"prompt": turns, **rest}
        made.append(row)
    return made


def ranks(task: Task, label: Label) -> list[int]:
    """Return the rank of each answer, 1 is best, of a ranking or a pair."""
    value: Mapping[str, Any] = label.value or {}
    if task.type == "ranking":
        return list(value["ranks"])
    strength = value["strength"]
    return [1 + (strength > 0), 1 + (strength < 0)]


def _plain(prompt: tuple[dict[str, str], ...]) -> Any:
    """Return a prompt as text if it is one turn, for bases without a chat template."""
    alone = len(prompt) == 1 and prompt[0]["role"] == "user"
    return prompt[0]["content"] if alone else list(prompt)


def _comparisons(given: list[Given]) -> Rows:
    """Return rows for `data.comparisons`; ratings of one prompt by one person are compared."""
    rated: dict[tuple[str, str], list[Given]] = defaultdict(list)
    for task, label in given:
        if task.type == "rating":
            rated[label.labeler, json.dumps(task.prompt)].append((task, label))
        else:
            yield from _comparison(task, [a.text for a in task.answers], ranks(task, label), label)
    for group in rated.values():
        scores = [(label.value or {})["overall"] for _, label in group]
        places = [1 + sum(other > score for other in scores) for score in scores]
        texts = [task.answers[0].text for task, _ in group]
        yield from _comparison(group[0][0], texts, places, group[0][1])


def _comparison(task: Task, texts: list[str], places: list[int], label: Label) -> Rows:
    if len({*places}) > 1:  # all ties teach nothing
        yield {
            "prompt": _plain(task.prompt),
            "completions": texts,
            "ranks": places,
            "labeler": label.labeler,
            "task": task.id,
        }


def _together(way: str) -> Callable[[list[Given]], Rows]:
    """Return a writer of one row a task, from all its labels: the majority's or the model's."""

    def rows(given: list[Given]) -> Rows:
        tasks = {task.id: task for task, _ in given}
        values = consensus([*tasks.values()], [label for _, label in given])[way]
        for name, (task, label) in {task.id: (task, label) for task, label in given}.items():
            agreed = replace(label, labeler=way, value=values.get(name, label.value))
            texts = [answer.text for answer in task.answers]
            yield from _comparison(task, texts, ranks(task, agreed), agreed)

    return rows


def _demonstrations(given: list[Given]) -> Rows:
    """Return rows for `data.demonstrations`."""
    for task, label in given:
        text, prompt = (label.value or {})["text"], _plain(task.prompt)
        about = {"labeler": label.labeler, "task": task.id}
        if isinstance(prompt, str):
            yield {"prompt": prompt, "completion": text, **about}
        else:
            yield {"messages": [*prompt, {"role": "assistant", "content": text}], **about}


def _rankings(given: list[Given]) -> Rows:
    """Return rows for `evaluate --labels`: models in groups, the best first."""
    for task, label in given:
        places = ranks(task, label)
        names = [
            [task.answers[i].model for i, place in enumerate(places) if place == rank]
            for rank in sorted({*places})
        ]
        row = {"set": task.set, "id": task.id.removeprefix(f"{task.set}/"), "ranking": names}
        why = {"why": task.why} if task.why else {}
        yield {**row, **why, "labeler": label.labeler}


def _judge_pairs(given: list[Given]) -> Rows:
    """Return rows for `judge --against`: pairs of answers with the verdicts of all people."""
    votes: dict[tuple[str, int, int], list[str]] = defaultdict(list)
    of = {task.id: task for task, _ in given}
    for task, label in given:
        places = ranks(task, label)
        for i, j in itertools.combinations(range(len(places)), 2):
            verdict = "tie" if places[i] == places[j] else "a" if places[i] < places[j] else "b"
            votes[task.id, i, j].append(verdict)
    for (name, i, j), verdicts in votes.items():
        task = of[name]
        pair = {"a": task.answers[i].text, "b": task.answers[j].text, "labels": verdicts}
        yield {"prompt": _plain(task.prompt), **pair, "kind": task.kind}


_COMPARED = ("ranking", "pair")
FORMS: dict[str, tuple[tuple[str, ...], Callable[[list[Given]], Rows]]] = {
    "comparisons": ((*_COMPARED, "rating"), _comparisons),
    "majority": (_COMPARED, _together("majority")),
    "consensus": (_COMPARED, _together("model")),
    "demonstrations": (("demonstration",), _demonstrations),
    "rankings": (_COMPARED, _rankings),
    "judge": (_COMPARED, _judge_pairs),
}
"""Form of a file of labels -> types of tasks that fit, and the function that makes its rows."""
