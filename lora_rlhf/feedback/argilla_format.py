# SPDX-License-Identifier: Apache-2.0
"""Argilla 2: records of a dataset as tasks and labels, and datasets to load there.

A dataset is the folder that `Dataset.to_disk` writes, or the file of `records.to_json`. Argilla
writes neither the state of a response (so that drafts count) nor which answers share a rank.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lora_rlhf.data import sources
from lora_rlhf.errors import DataError, UsageError, reason
from lora_rlhf.recipe.schema import DataSource
from lora_rlhf.runs.disk import write_atomically

from . import foreign_formats as foreign
from .foreign_formats import STRENGTHS, Import, Names, Question, Unusable, fault, mapping
from .labels import FLAGS, OVERALL, QUESTIONS, Label, Task

RECORDS, SETTINGS, DATASET = "records.json", ".argilla/settings.json", ".argilla/dataset.json"

_RECORD = (
    "id", "fields", "metadata", "suggestions", "responses", "vectors", "status", "_server_id",
    "score",
)  # fmt: skip
_RESPONSE = ("value", "user_id", "status")
_SETTINGS = (
    "guidelines", "questions", "fields", "vectors", "metadata", "allow_extra_metadata",
    "distribution", "mapping",
)  # fmt: skip
_TYPES = ("ranking", "rating", "label_selection", "multi_label_selection", "text")


def read(path: Path, names: Names, own: Mapping[str, Task]) -> Import:
    """Read a dataset's folder or its records.

    Raises:
        DataError: It is no such file, or holds an unknown field, with its place.
    """
    imported, types = Import(), dict[str, str]()
    if path.is_dir():
        settings = path / SETTINGS
        if settings.is_file():
            imported.guidelines, types = _settings(settings, names)
        path = path / RECORDS
    for where, row in sources.read(DataSource(path=str(path)), sources.Skips()):
        foreign.check_keys(where, "a record", row, _RECORD, names)
        fields = mapping(where, "fields", row.get("fields"))
        prompt, keys = foreign.split(f"{where}, fields", fields, names)
        content = (
            foreign.turns(f"{where}, field {prompt}", fields[prompt]),
            foreign.texts(where, fields, keys),
        )
        given = mapping(where, "responses", row.get("responses") or {})
        replies = []
        for person, answered in _by_person(where, given, keys, types, names).items():
            try:
                if None in answered:
                    raise Unusable("drafts")
                about = f"{where}, response of {person}"
                replies.append(foreign.reply(about, person, [q for q in answered if q], keys))
            except Unusable as reason:
                imported.unused[str(reason)] += 1
        name = str(row.get("id") or row.get("_server_id"))
        name = name if name in own else f"argilla/{name}"
        imported.items.append(foreign.item(where, name, content, replies, own))
    return imported


def _settings(path: Path, names: Names) -> tuple[str, dict[str, str]]:
    """Return the guidelines, and the type of each question."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"the settings cannot be read: {reason(error)}", where=str(path)) from None
    settings = mapping(str(path), "the file", settings)
    foreign.check_keys(str(path), "the settings", settings, _SETTINGS, names)
    types: dict[str, str] = {}
    for one in settings.get("questions") or []:
        name, kind = one.get("name"), (one.get("settings") or {}).get("type")
        if kind not in _TYPES and name not in names.ignore:
            raise fault(
                str(path),
                f"the question {name!r:.60} is of type {kind!r:.40}",
                f"one of {', '.join(_TYPES)}",
                f"leave it out: --ignore {name}",
            )
        types[str(name)] = str(kind)
    for one in settings.get("fields") or []:
        name, kind = one.get("name"), (one.get("settings") or {}).get("type")
        if kind not in ("text", "chat") and name not in names.ignore:
            raise fault(
                str(path),
                f"the field {name!r:.60} is of type {kind!r:.40}",
                "text or chat",
                f"leave it out: --ignore {name}",
            )
    return str(settings.get("guidelines") or ""), types


def _by_person(
    where: str,
    responses: dict[str, Any],
    answers: list[str],
    types: Mapping[str, str],
    names: Names,
) -> dict[str, list[Question | None]]:
    """Return the answers of each person; None stands for a draft."""
    people: dict[str, list[Question | None]] = defaultdict(list)
    for name, given in responses.items():
        if name in names.ignore:
            continue
        for number, one in enumerate(given or [], 1):
            at = f"{where}, response {number} to {name}"
            one = mapping(at, "response", one)
            foreign.check_keys(at, "a response", one, _RESPONSE, names)
            mine = people[str(one.get("user_id"))]
            if one.get("status") == "draft":
                mine.append(None)
            elif one.get("status") != "discarded" and one.get("value") is not None:
                mine.append(_question(at, name, one["value"], answers, types.get(name)))
    return people


def _question(where: str, name: str, value: Any, answers: list[str], kind: str | None) -> Question:
    """Return one response; without settings its type follows from the value."""
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        ranking = kind == "ranking" or (kind is None and {*value} >= {*answers})
        ranking = ranking and bool(answers)
        return Question(name, {v: n for n, v in enumerate(value, 1)} if ranking else value)
    if isinstance(value, str):
        known = {*answers, *STRENGTHS}
        option = kind == "label_selection" or (kind is None and value in known and answers)
        return Question(name, [value] if option else value)
    if isinstance(value, int | float):
        return Question(name, value, _about(name, answers))
    raise fault(
        where,
        f"the value is {value!r:.60}",
        "a text, a number, or a list of texts",
        f"leave its question out: --ignore {name}",
    )


def _about(question: str, answers: list[str]) -> str:
    """Return the answer that a rating is about, by its name or number in that of the question."""
    number = re.search(r"\d+$", question)
    for answer in answers if len(answers) > 1 else ():
        if question.endswith(answer) or (number and re.search(rf"(?<!\d){number[0]}$", answer)):
            return answer
    return ""


# ------------------------------------------------------------------------------ writing


def write(
    tasks: Iterable[Task],
    labels: Iterable[Label],
    folder: Path,
    guidelines: str,
    unlabelled: bool = False,
) -> Counter[str]:
    """Write a dataset for each type of task and number of answers, for `Dataset.from_disk`.

    Returns:
        Counts of tasks, of labels, and of what was left out.

    Raises:
        UsageError: There is such a dataset already.
    """
    groups: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    counts: Counter[str] = Counter()
    for task, mine in foreign.exported(tasks, labels, unlabelled):
        responses: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for label in mine:
            ranks = (label.value or {}).get("ranks", ())
            if len({*ranks}) < len(ranks):
                counts["left out: rankings with ties, which Argilla does not have"] += 1
                continue
            counts["labels"] += label.value is not None
            for name, value in _responses(task, label).items():
                responses[name].append({"value": value, "user_id": foreign.user_id(label.labeler)})
        fields = {"prompt": list(task.prompt), **{one.model: one.text for one in task.answers}}
        record = {"id": task.id, "fields": fields, "metadata": {}, "suggestions": {}}
        record |= {"responses": dict(responses), "vectors": {}, "status": "pending"}
        groups[task.type, len(task.answers)].append(record | {"_server_id": None})
        counts["tasks"] += 1
    for (kind, answers), records in groups.items():
        name = kind if kind in ("rating", "demonstration", "pair") else f"{kind}-{answers}"
        if (folder / name).exists():
            raise UsageError(
                "there is something already", where=str(folder / name), expected="a new folder"
            )
        (folder / name / SETTINGS).parent.mkdir(parents=True)
        _write(folder / name / RECORDS, records)
        _write(folder / name / SETTINGS, _settings_of(kind, answers, guidelines))
        about = {"id": None, "inserted_at": None, "updated_at": None, "name": name}
        _write(folder / name / DATASET, {**about, "guidelines": guidelines, "status": "draft"})
    return counts


def _write(path: Path, data: Any) -> None:
    write_atomically(path, json.dumps(data, ensure_ascii=False, indent=1) + "\n")


def _responses(task: Task, label: Label) -> dict[str, Any]:
    value, marks = label.value or {}, [*label.flags, *["both_bad"] * label.both_bad]
    given: dict[str, Any] = {"flags": marks} if marks else {}
    if label.note and task.answers:
        given["note"] = label.note
    if "ranks" in value:
        order = sorted(range(len(task.answers)), key=value["ranks"].__getitem__)
        given["ranking"] = [task.answers[index].model for index in order]
    elif "strength" in value:
        strength = value["strength"]
        given["preference"] = next(key for key, number in STRENGTHS.items() if number == strength)
    elif "overall" in value:
        given["overall"] = value["overall"]
        given["questions"] = [key for key, holds in value["questions"].items() if holds]
    elif "text" in value:
        given["demonstration"] = value["text"]
    return given


def _settings_of(kind: str, answers: int, guidelines: str) -> dict[str, Any]:
    """Return the settings as Argilla serialises them."""
    new = {"id": None, "inserted_at": None, "updated_at": None, "dataset_id": None}

    def one(name: str, required: bool, **settings: Any) -> dict[str, Any]:
        about = {"name": name, "title": name, "description": None, "required": required}
        return {**new, **about, "settings": settings}

    def options(given: Iterable[str], marks: Mapping[str, str] = QUESTIONS) -> list[dict[str, str]]:
        return [{"value": key, "text": marks.get(key, key)} for key in given]

    names = [f"answer_{number}" for number in range(1, answers + 1)]
    flags = [*FLAGS, "both_bad"]
    questions = {
        "ranking": [one("ranking", True, type="ranking", options=options(names))],
        "pair": [one("preference", True, type="label_selection", options=options(STRENGTHS))],
        "rating": [
            one(
                "overall",
                True,
                type="rating",
                options=[{"value": value} for value in range(OVERALL[0], OVERALL[1] + 1)],
            ),
            one("questions", False, type="multi_label_selection", options=options(QUESTIONS)),
        ],
        "demonstration": [one("demonstration", True, type="text", use_markdown=False)],
    }[kind]
    questions.append(one("flags", False, type="multi_label_selection", options=options(flags)))
    if answers:
        questions.append(one("note", False, type="text", use_markdown=False))
    return {
        "guidelines": guidelines,
        "questions": questions,
        "fields": [
            one("prompt", True, type="chat", use_markdown=False),
            *(one(name, True, type="text", use_markdown=False) for name in names),
        ],
        "vectors": [],
        "metadata": [],
        "allow_extra_metadata": True,
        "distribution": {"strategy": "overlap", "min_submitted": 1},
        "mapping": None,
    }
