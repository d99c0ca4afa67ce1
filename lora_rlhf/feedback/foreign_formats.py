# SPDX-License-Identifier: Apache-2.0
"""Shared by the readers and writers of other labelling tools: their answers as values of ours."""

from __future__ import annotations

import hashlib
import hmac
import json
import random
import re
import uuid
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lora_rlhf.errors import DataError

from .labels import (
    ANSWERS,
    FLAGS,
    QUESTIONS,
    Answer,
    Label,
    Task,
    check_text,
    check_value,
    in_task_order,
    personal,
)

STRENGTHS = {"a3": -3, "a2": -2, "a1": -1, "tie": 0, "b1": 1, "b2": 2, "b3": 3}
"""Option of a pair, as we write it -> strength."""
BETTER = 2
"""Strength of a preference for which the other tool has no degrees."""

_SIDES = {
    **STRENGTHS,
    **dict.fromkeys(("left", "a", "first"), -BETTER),
    **dict.fromkeys(("right", "b", "second"), BETTER),
    **dict.fromkeys(("equal", "same", "draw", "no preference"), 0),
}
_PROMPTS = ("prompt", "instruction", "question", "query", "messages", "conversation", "chat")
_ANSWER = re.compile(r"(answer|response|completion|output|generation)s?[-_ ]?(\d+|[a-z])?", re.I)
_ROLES = ("system", "user", "assistant")
_NAMESPACE = uuid.UUID("6c6f7261-2d72-6c68-6600-6c6162656c73")


@dataclass(frozen=True)
class Names:
    """Fields of a file as the user names them: `--field OURS=THEIRS` and `--ignore`."""

    prompt: str = ""
    answers: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()


@dataclass(frozen=True)
class Question:
    """One answer of a person: an order of names, chosen options, a number or a text.

    `about` is the answer that a number is about, if it is about one of several.
    """

    name: str
    value: Any
    about: str = ""


@dataclass(frozen=True)
class Reply:
    """All that one person said of one task; `person` is the other tool's name for them."""

    person: str
    kind: str
    value: dict[str, Any] | None
    flags: tuple[str, ...] = ()
    both_bad: bool = False
    note: str = ""
    seconds: float = 0.0
    created: str = ""


@dataclass(frozen=True)
class Item:
    """A task of another tool's file, in its order of answers, with the replies to it."""

    where: str
    task: Task
    replies: tuple[Reply, ...] = ()


@dataclass
class Import:
    """Tasks and labels of another tool's file; `unused` counts what was left by reason."""

    items: list[Item] = field(default_factory=list)
    unused: Counter[str] = field(default_factory=Counter)
    guidelines: str = ""


class Unusable(Exception):
    """A reply that is right in the other tool and cannot be a label; the text says why."""


def fault(where: str, given: str, expected: str, remedy: str = "") -> DataError:
    """Return the error for a file that is not as expected."""
    return DataError(given, where=where, expected=expected, remedy=remedy or "correct the file")


def mapping(where: str, what: str, given: Any) -> dict[str, Any]:
    """Return a JSON object, or raise its error."""
    if not isinstance(given, dict):
        raise fault(where, f"{what} is {given!r:.60}", "a JSON object")
    return given


def check_keys(
    where: str, what: str, given: Mapping[str, Any], known: Collection[str], names: Names
) -> None:
    """Refuse a field that we do not know."""
    if unknown := [key for key in given if key not in known and key not in names.ignore]:
        raise fault(
            where,
            f"unknown field {unknown[0]!r:.60} in {what}",
            f"some of {', '.join(known)}",
            f"if it says nothing about prompt and answers: --ignore {unknown[0]}",
        )


def split(
    where: str, given: Mapping[str, Any], names: Names, extra: Collection[str] = ()
) -> tuple[str, list[str]]:
    """Return the field that holds the prompt, and those that hold the answers."""
    left = [key for key in given if key not in names.ignore and key not in extra]
    prompt = names.prompt or next((key for key in _PROMPTS if key in left), "")
    if prompt not in left:
        raise fault(
            where,
            f"no field is known to hold the prompt: {', '.join(left)}",
            f"one of {', '.join(_PROMPTS)}",
            "name it: --field prompt=THEIRS",
        )
    left.remove(prompt)
    answers = [*names.answers] or [key for key in left if _ANSWER.fullmatch(key)]
    if wrong := [key for key in left if key not in answers]:
        raise fault(
            where,
            f"unknown field {wrong[0]!r:.60} beside the prompt {prompt!r}",
            "fields named answer_1, response_a and the like",
            f"if it is an answer: --field answer={wrong[0]}; if not: --ignore {wrong[0]}",
        )
    return prompt, [key for key in answers if key in given]


def turns(where: str, given: Any) -> tuple[dict[str, str], ...]:
    """Return a prompt of text or of turns as turns; the last one is the user's."""
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not isinstance(given, list) or not all(isinstance(turn, dict) for turn in given):
        raise fault(where, f"the prompt is {given!r:.60}", "a text, or turns of role and content")
    kept = tuple({key: turn.get(key) for key in ("role", "content")} for turn in given)
    good = all(t["role"] in _ROLES and isinstance(t["content"], str) for t in kept)
    if not kept or not good or kept[-1]["role"] != "user" or not kept[-1]["content"].strip():
        raise fault(where, f"the prompt is {given!r:.80}", "turns that end with the user's text")
    return kept  # type: ignore[return-value]


def texts(where: str, given: Mapping[str, Any], keys: Iterable[str]) -> tuple[Answer, ...]:
    """Return the answers in these fields; their names stand for the unknown models."""
    for key in keys:
        if not isinstance(given[key], str):
            raise fault(where, f"the answer {key!r} is {given[key]!r:.60}", "a text")
    return tuple(Answer(key, given[key]) for key in keys)


def reply(
    where: str, person: str, answered: Sequence[Question], names: Sequence[str], **about: Any
) -> Reply:
    """Make one person's answers a value of ours.

    Args:
        names: Names of the task's answers, in its order.
        about: seconds and created.

    Raises:
        Unusable: It cannot be one, although nothing is wrong with it.
        DataError: An option or a value is not known.
    """
    values: list[tuple[str, dict[str, Any]]] = []
    chosen, notes, numbers = list[str](), list[str](), dict[str, int]()
    for one in answered:
        at = f"{where}, {one.name}"
        if isinstance(one.value, dict):
            values.append(("ranking", {"ranks": _ranks(at, one.value, names)}))
        elif isinstance(one.value, list):
            chosen += one.value
        elif isinstance(one.value, str) and not names:
            values.append(("demonstration", {"text": one.value}))
        elif isinstance(one.value, str):
            notes.append(one.value)
        else:
            numbers[one.about or "overall"] = _number(at, one.value)
    flags = tuple(flag for flag in FLAGS if flag in chosen)
    rest = [one for one in chosen if one not in (*FLAGS, "both_bad", *QUESTIONS)]
    if rest:
        values.append(("pair", {"strength": _strength(where, rest, names)}))
    if numbers:
        values.append(_rated(where, numbers, names, chosen))
    if len(values) > 1:
        raise fault(
            where,
            f"two answers to one task: a {values[0][0]} and a {values[1][0]}",
            "one of them",
            "leave the question of the other out: --ignore QUESTION",
        )
    kind, value = values[0] if values else ("", {})
    if kind:
        try:
            value = check_value(kind, value, len(names))
        except ValueError as error:
            raise fault(where, str(error), f"the value of a {kind}") from None
    note = "\n".join(notes)
    return Reply(person, kind, value or None, flags, "both_bad" in chosen, note, **about)


def _ranks(where: str, order: Mapping[str, int], names: Sequence[str]) -> list[int]:
    if wrong := [name for name in order if name not in names]:
        raise fault(where, f"{wrong[0]!r:.60} is ranked", f"one of {', '.join(names)}")
    if len(order) < len(names):
        raise Unusable("rankings of only some answers")
    return [order[name] for name in names]


def _strength(where: str, chosen: Sequence[str], names: Sequence[str]) -> int:
    sides = dict(_SIDES)
    if len(names) == 2:
        sides |= {names[0].lower(): -BETTER, names[1].lower(): BETTER}
    option = str(chosen[0]).strip().lower()
    if len(names) != 2 or len(chosen) > 1 or option not in sides:
        known = [*sides] if len(names) == 2 else [*FLAGS, "both_bad", *QUESTIONS]
        raise fault(
            where,
            f"the option {str(chosen[0])!r:.60} is not known",
            f"one of {', '.join(known)}",
            "leave its question out: --ignore QUESTION",
        )
    return sides[option]


def _rated(
    where: str, numbers: Mapping[str, int], names: Sequence[str], chosen: Collection[str]
) -> tuple[str, dict[str, Any]]:
    """Return one rating as it is, and ratings of several answers as a ranking."""
    if len(names) == 1 and len(numbers) == 1:
        yes = {key: key in chosen for key in QUESTIONS}
        return "rating", {"overall": next(iter(numbers.values())), "questions": yes}
    if "overall" in numbers:
        raise fault(
            where,
            f"a rating of {len(names)} answers together",
            "a rating of one answer, or one of each, such as quality-answer_1",
        )
    if len(numbers) < len(names):
        raise Unusable("ratings of only some answers")
    scores = [numbers[name] for name in names]
    return "ranking", {"ranks": [1 + sum(other > score for other in scores) for score in scores]}


def _number(where: str, given: Any) -> int:
    if isinstance(given, bool) or not isinstance(given, int | float) or given != int(given):
        raise fault(where, f"the value {given!r:.60}", "a whole number")
    return int(given)


def item(
    where: str,
    name: str,
    given: tuple[tuple[dict[str, str], ...], tuple[Answer, ...]],
    replies: Sequence[Reply],
    own: Mapping[str, Task],
) -> Item:
    """Return a task with its replies, of the type that these show.

    Args:
        given: Prompt and answers.
        own: The project's tasks by id, whose type counts where no reply shows one.

    Raises:
        DataError: The replies are of two types, or too many answers.
    """
    prompt, answers = given
    kinds = {one.kind for one in replies if one.kind}
    if len(kinds) > 1:
        raise fault(where, f"answers of two types: {', '.join(sorted(kinds))}", "one type a task")
    default = {0: "demonstration", 1: "rating", 2: "pair"}.get(len(answers), "ranking")
    kind = next(iter(kinds), own[name].type if name in own else default)
    low, high = ANSWERS[kind]
    if not low <= len(answers) <= high:
        raise fault(where, f"{len(answers)} answers", f"{low} to {high} for a {kind}")
    return Item(where, Task(name, kind, prompt, answers), tuple(replies))


def shuffled(task: Task) -> tuple[int, ...]:
    """Return a random order of a task's answers, always the same: names must not show a model."""
    order = list(range(len(task.answers)))
    random.Random(f"shown elsewhere/{task.id}").shuffle(order)
    return tuple(order)


def user_id(labeler: str) -> str:
    """Return a UUID for a labeler, for tools that ask for one."""
    return str(uuid.uuid5(_NAMESPACE, labeler))


def pseudonym(key: bytes, tool: str, person: str) -> str:
    """Return the name of a person of another tool in this project; the key never leaves it."""
    return f"{tool}-{hmac.new(key, person.encode(), hashlib.sha256).hexdigest()[:10]}"


def placed(
    imported: Import, own: Mapping[str, Task], known: Mapping[str, str], named: Mapping[str, str]
) -> tuple[list[Task], list[Label]]:
    """Return new tasks and all labels, in the order of answers of the project's own tasks.

    Args:
        known: Labelers of the project by what the other tool calls them.
        named: Pseudonyms of all others.

    Raises:
        DataError: A task has the id of one of the project's and is not it, or a text cannot be
            stored.
    """
    tasks, labels = [], []
    sha256 = hashlib.sha256(imported.guidelines.encode()).hexdigest() if imported.guidelines else ""
    for one in imported.items:
        task, order = one.task, tuple(range(len(one.task.answers)))
        try:
            check_text(json.dumps(asdict(one), ensure_ascii=False))
        except ValueError as error:
            raise fault(one.where, str(error), "texts of whole characters") from None
        if task.id in own:
            task, order = own[task.id], _same(one, own[task.id])
        else:
            tasks.append(task)
        for given in one.replies:
            value = given.value and in_task_order(task.type, given.value, order)
            who = known.get(given.person) or named[given.person]
            about = given.flags, given.both_bad, given.note, order, given.seconds
            labels.append(Label(0, task.id, who, value, *about, sha256, given.created))
    return tasks, labels


def _same(given: Item, own: Task) -> tuple[int, ...]:
    """Return for each answer its index in the project's own task."""
    left = list(enumerate(answer.text for answer in own.answers))
    order = []
    for answer in given.task.answers:
        match = next((pair for pair in left if pair[1] == answer.text), None)
        if match is None:
            break
        left.remove(match)
        order.append(match[0])
    if left or len(order) < len(given.task.answers) or given.task.prompt != own.prompt:
        raise fault(
            given.where,
            f"its prompt or answers are not those of the task {own.id!r:.60} in the project",
            "the task as it was exported",
            "import the file into another project",
        )
    if given.task.type != own.type:
        raise fault(given.where, f"labels of a {given.task.type}", f"those of a {own.type}")
    return tuple(order)


def exported(
    tasks: Iterable[Task], labels: Iterable[Label], unlabelled: bool
) -> Iterator[tuple[Task, list[Label]]]:
    """Yield each task in the order in which it is shown elsewhere, with its labels in that order.

    Gold items, and tasks with a prompt that somebody flagged as personal data, stay here.
    """
    tasks, labels = list(tasks), list(labels)
    of_task: dict[str, list[Label]] = defaultdict(list)
    for label in labels:
        of_task[label.task].append(label)
    hidden = personal(tasks, labels)
    for task in tasks:
        if task.gold is not None or task.id in hidden:
            continue
        order = shuffled(task)
        places = tuple(order.index(index) for index in range(len(order)))
        answers = tuple(
            Answer(f"answer_{place}", task.answers[index].text)
            for place, index in enumerate(order, start=1)
        )
        mine = [] if unlabelled else of_task.get(task.id, [])
        yield (
            replace(task, answers=answers),
            [
                replace(one, value=one.value and in_task_order(task.type, one.value, places))
                for one in mine
            ],
        )
