# SPDX-License-Identifier: Apache-2.0
"""Label Studio: its JSON export as tasks and labels, and projects to import there.

We rank with one bucket a rank, so that answers may share one; a pair's seven steps and a rating's
questions are choices.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

from lora_rlhf.data import sources
from lora_rlhf.recipe.schema import DataSource
from lora_rlhf.runs.disk import write_atomically

from . import foreign_formats as foreign
from .foreign_formats import STRENGTHS, Import, Names, Question, Reply, Unusable, fault, mapping
from .labels import FLAGS, OVERALL, QUESTIONS, Answer, Label, Task

_TASK = (
    "id", "data", "annotations", "predictions", "drafts", "meta", "created_at", "updated_at",
    "inner_id", "total_annotations", "cancelled_annotations", "total_predictions", "comment_count",
    "unresolved_comment_count", "last_comment_updated_at", "project", "updated_by", "file_upload",
    "comment_authors", "allow_skip", "is_labeled", "overlap", "state", "agreement", "reviews",
    "annotators", "reviewers", "annotations_results", "predictions_results", "completed_at",
)  # fmt: skip
_ANNOTATION = (
    "id", "completed_by", "result", "was_cancelled", "ground_truth", "created_at", "updated_at",
    "draft_created_at", "lead_time", "prediction", "result_count", "unique_id", "import_id",
    "last_action", "bulk_created", "task", "project", "updated_by", "parent_prediction",
    "parent_annotation", "last_created_by", "state", "reviews", "comments",
)  # fmt: skip
_RESULT = (
    "id", "from_name", "to_name", "type", "value", "origin", "meta", "score", "readonly", "hidden",
    "parentID", "item_index", "source",
)  # fmt: skip
LABELER = "labeler: "
"""Beginning of the region's note in which we write who gave a label."""
_SHOWN = {
    "a3": "A is much better", "a2": "A is better", "a1": "A is slightly better",
    "tie": "about the same",
    "b1": "B is slightly better", "b2": "B is better", "b3": "B is much better",
}  # fmt: skip
"""Option of a pair, by `STRENGTHS` -> as people see it."""
_BUCKET = re.compile(r"rank[-_ ]?(\d+)", re.I)


def read(path: Path, names: Names, own: Mapping[str, Task]) -> Import:
    """Read a JSON export (not JSON-MIN, which lacks who labelled).

    Raises:
        DataError: It is no such file, or holds an unknown field, with its place.
    """
    imported = Import()
    for where, row in sources.read(DataSource(path=str(path)), sources.Skips()):
        foreign.check_keys(where, "a task", row, _TASK, names)
        data = mapping(where, "data", row.get("data"))
        prompt, answers = _content(where, data, names)
        replies = []
        for number, annotation in enumerate(row.get("annotations") or [], 1):
            at = f"{where}, annotation {number}"
            try:
                replies.append(_reply(at, mapping(at, "annotation", annotation), answers, names))
            except Unusable as reason:
                imported.unused[str(reason)] += 1
        name = str(data.get("task") or f"label-studio/{row.get('id')}")
        imported.items.append(foreign.item(where, name, (prompt, answers), replies, own))
    return imported


def _content(
    where: str, data: dict[str, Any], names: Names
) -> tuple[tuple[dict[str, str], ...], tuple[Answer, ...]]:
    """Return prompt and answers of a task: texts, or a list of items to rank."""
    at = f"{where}, data"
    lists = [
        key
        for key, value in data.items()
        if key != names.prompt and isinstance(value, list) and value
        if all(isinstance(one, dict) and {"id", "body"} <= one.keys() for one in value)
    ]
    prompt, answers = foreign.split(at, data, names, [*lists[:1], "task"])
    if not lists:
        return foreign.turns(at, data[prompt]), foreign.texts(at, data, answers)
    items = {str(one["id"]): one["body"] for one in data[lists[0]]}
    if answers:
        raise fault(at, f"answers in {lists[0]!r} and in {answers[0]!r}", "one place for answers")
    return foreign.turns(at, data[prompt]), foreign.texts(at, items, items)


def _reply(
    where: str, annotation: dict[str, Any], answers: tuple[Answer, ...], names: Names
) -> Reply:
    foreign.check_keys(where, "an annotation", annotation, _ANNOTATION, names)
    results = annotation.get("result") or []
    person, answered = annotation.get("completed_by"), []
    if isinstance(person, dict):
        person = person.get("id") or person.get("email")
    for number, result in enumerate(results, 1):
        at = f"{where}, result {number}"
        result = mapping(at, "result", result)
        foreign.check_keys(at, "a result", result, _RESULT, names)
        for text in (result.get("meta") or {}).get("text") or ():
            person = text if str(text).startswith(LABELER) else person
        if result.get("from_name") not in names.ignore:
            answered.append(_question(at, result, [one.model for one in answers]))
    if person is None:
        raise fault(where, "completed_by is missing", "who labelled", "export as JSON, in full")
    about: dict[str, Any] = {
        "seconds": float(annotation.get("lead_time") or 0.0),
        # An annotation that was corrected keeps its `created_at`.
        "created": max(_time(where, annotation, key) for key in ("created_at", "updated_at")),
    }
    person = str(person)
    if annotation.get("was_cancelled") or not results:
        return Reply(person, "", None, **about)
    return foreign.reply(where, person, answered, [one.model for one in answers], **about)


def _time(where: str, annotation: Mapping[str, Any], key: str) -> str:
    """Return a time as ours are written; empty if there is none."""
    given = annotation.get(key)
    try:
        moment = datetime.fromisoformat(given) if given else None
    except (TypeError, ValueError):
        raise fault(where, f"{key} is {given!r:.60}", "a time in ISO 8601") from None
    return moment.astimezone(UTC).isoformat(timespec="milliseconds") if moment else ""


def _question(where: str, result: dict[str, Any], answers: list[str]) -> Question:
    """Return one result as an answer to a question."""
    name, kind = str(result.get("from_name")), result.get("type")
    value = mapping(where, "value", result.get("value"))
    known = {
        "pairwise": "selected", "ranker": "ranker", "choices": "choices", "rating": "rating",
        "textarea": "text",
    }  # fmt: skip
    if kind not in known or known[kind] not in value:
        raise fault(
            where,
            f"a result of type {kind!r:.40} with the value {value!r:.60}",
            f"one of {', '.join(known)}",
            f"leave its question out: --ignore {name}",
        )
    given = value[known[kind]]
    if kind == "pairwise":
        return Question(name, [given])
    if kind == "ranker":
        return Question(name, _order(where, given))
    if kind == "textarea":
        return Question(name, "\n".join(given) if isinstance(given, list) else given)
    about = str(result.get("to_name"))
    return Question(name, given, about if about in answers and len(answers) > 1 else "")


def _order(where: str, given: Any) -> dict[str, int]:
    """Return the rank of each item: of a list, or of buckets that are ranks."""
    if isinstance(given, list):
        given = {"_": given}
    filled = {key: ids for key, ids in mapping(where, "ranker", given).items() if ids}
    ranked = {key: _BUCKET.fullmatch(key) for key in filled}
    if filled and all(ranked.values()):
        return {
            str(one): int(match[1]) for key, match in ranked.items() if match for one in filled[key]
        }
    if len(filled) != 1:
        raise Unusable("rankings in several buckets, whose order is not known")
    [ids] = filled.values()
    return {str(one): place for place, one in enumerate(ids, 1)}


# ------------------------------------------------------------------------------ writing


def write(
    tasks: Iterable[Task],
    labels: Iterable[Label],
    folder: Path,
    guidelines: str,
    unlabelled: bool = False,
) -> Counter[str]:
    """Write one project a type of task: TYPE.json to import, TYPE.xml as its labelling interface.

    Returns:
        Counts of tasks, of labels, and of what was left out.
    """
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    counts: Counter[str] = Counter()
    for task, mine in foreign.exported(tasks, labels, unlabelled):
        counts["tasks"] += 1
        counts["labels"] += len(mine)
        data: dict[str, Any] = {"task": task.id, "prompt": list(task.prompt)}
        if task.type == "ranking":
            data["items"] = [{"id": one.model, "body": one.text} for one in task.answers]
        else:
            data |= {one.model: one.text for one in task.answers}
        annotations = [_annotation(task, label) for label in mine]
        groups[task.type].append({"data": data, "annotations": annotations})
    folder.mkdir(parents=True, exist_ok=True)
    for kind, rows in groups.items():
        text = json.dumps(rows, ensure_ascii=False, indent=1) + "\n"
        write_atomically(folder / f"{kind}.json", text)
        write_atomically(folder / f"{kind}.xml", _interface(kind))
    write_atomically(folder / "instructions.md", guidelines)
    return counts


def _annotation(task: Task, label: Label) -> dict[str, Any]:
    """Return a label as an annotation; a user is not named, as Label Studio must know them."""
    results: list[dict[str, Any]] = []

    def add(name: str, to: str, kind: str, **value: Any) -> None:
        meta = {"text": [f"{LABELER}{label.labeler}"]}
        result = {"from_name": name, "to_name": to, "type": kind, "value": value, "meta": meta}
        results.append(result | {"id": f"{label.id}-{len(results)}", "origin": "manual"})

    value, marks = label.value or {}, [*label.flags, *["both_bad"] * label.both_bad]
    if "ranks" in value:
        buckets: dict[str, list[str]] = defaultdict(list)
        for answer, rank in zip(task.answers, value["ranks"], strict=True):
            buckets[f"rank-{rank}"].append(answer.model)
        add("ranking", "answers", "ranker", ranker=buckets)
    elif "strength" in value:
        option = next(key for key, strength in STRENGTHS.items() if strength == value["strength"])
        add("preference", "prompt", "choices", choices=[option])
    elif "overall" in value:
        add("overall", "answer_1", "rating", rating=value["overall"])
        yes = [key for key, holds in value["questions"].items() if holds]
        add("questions", "answer_1", "choices", choices=yes)
    elif "text" in value:
        add("demonstration", "prompt", "textarea", text=[value["text"]])
    if marks:
        add("flags", "prompt", "choices", choices=marks)
    if label.note and task.answers:
        add("note", "prompt", "textarea", text=[label.note])
    about = {"was_cancelled": label.value is None, "lead_time": label.seconds}
    if not results:  # skipped without a word: somebody must be named
        add("flags", "prompt", "choices", choices=[])
    return {"result": results, "ground_truth": False, "created_at": label.created, **about}


def _choice(text: str, name: str) -> str:
    """Return a choice that shows a text, and stands in results by its name."""
    return f"<Choice value={quoteattr(text)} alias={quoteattr(name)}/>"


def _interface(kind: str) -> str:
    """Return the labelling interface of a type of task."""
    shown = {
        "ranking": '<List name="answers" value="$items"/>\n<Ranker name="ranking" toName="answers">'
        + "".join(f'<Bucket name="rank-{n}" title="{n}"/>' for n in range(1, 10))
        + "</Ranker>",
        "pair": '<View style="display: flex; gap: 2em">'
        '<View><Header value="A"/><Text name="answer_1" value="$answer_1"/></View>'
        '<View><Header value="B"/><Text name="answer_2" value="$answer_2"/></View></View>'
        '\n<Choices name="preference" toName="prompt" choice="single">'
        + "".join(_choice(text, option) for option, text in _SHOWN.items())
        + "</Choices>",
        "rating": '<Text name="answer_1" value="$answer_1"/>\n'
        f'<Rating name="overall" toName="answer_1" maxRating="{OVERALL[1]}"/>\n'
        '<Choices name="questions" toName="answer_1" choice="multiple">'
        + "".join(_choice(text, key) for key, text in QUESTIONS.items())
        + "</Choices>",
        "demonstration": '<TextArea name="demonstration" toName="prompt" rows="8" maxSubmissions='
        '"1"/>',
    }
    note = '<TextArea name="note" toName="prompt" maxSubmissions="1" placeholder="Note"/>\n'
    marks = {**{flag: flag.replace("_", " ") for flag in FLAGS}, "both_bad": "all answers are bad"}
    flags = "".join(_choice(text, mark) for mark, text in marks.items())
    return (
        '<View>\n<Paragraphs name="prompt" value="$prompt" layout="dialogue" nameKey="role" '
        f'textKey="content"/>\n{shown[kind]}\n'
        f'<Choices name="flags" toName="prompt" choice="multiple">{flags}</Choices>\n'
        f"{'' if kind == 'demonstration' else note}</View>\n"
    )
