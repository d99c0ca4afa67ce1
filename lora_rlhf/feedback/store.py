# SPDX-License-Identifier: Apache-2.0
"""The store of a labelling project: tasks, assignments, labels and guidelines in SQLite.

Rows of tasks, assignments, labels, labelers and guidelines are added and never changed; a
correction is a new row. Each has a checksum over its content and the checksum of the row before
it, so that an edited, removed or inserted row is noticed when the store is opened. The checksums
hold no secret: they show accidents and careless edits, not forgery.

A label counts as saved when `submit` returns: SQLite then has synced it to the disk.
"""

from __future__ import annotations

import hashlib
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from lora_rlhf import extras
from lora_rlhf.data import answer_format
from lora_rlhf.errors import DamageError, DataError, UsageError
from lora_rlhf.runtime.sqlite_file import SqliteFile

from .labels import (
    FLAGS,
    LONGEST_NOTE,
    Answer,
    Label,
    Task,
    check_text,
    check_value,
    in_shown_order,
    in_task_order,
)

if TYPE_CHECKING:
    from sqlalchemy import Connection, Table
    from sqlalchemy.engine import Row

sa: Any = extras.load("sqlalchemy", "a labelling project", "feedback")

OWN_IDLE, IDLE = 120.0, 24 * 3600.0
"""Seconds without a sign of life after which another tab of the labeler, or another labeler, may
have what was assigned."""

TOTAL_SECONDS = 5.0
"""Seconds for which the number of tasks that are left for a labeler is kept; it takes time."""

SCREENING = "screening"
"""The `why` of gold tasks that every labeler gets first."""

_META = sa.MetaData()


def _table(name: str, *columns: Any) -> Any:
    return sa.Table(name, _META, sa.Column("id", sa.Integer, primary_key=True), *columns)


def _text(name: str, nullable: bool = False, unique: bool = False) -> Any:
    return sa.Column(name, sa.Text, nullable=nullable, unique=unique)


def _number(name: str, nullable: bool = False) -> Any:
    return sa.Column(name, sa.Integer, nullable=nullable)


_tasks = _table(
    "tasks",
    _text("task", unique=True),
    _text("content"),
    _text("checksum"),
    _text("role"),  # normal, gold or screening
    _number("wanted"),
    _number("taken"),
)
_assignments = _table(
    "assignments",
    _text("task"),
    _text("labeler"),
    _text("shown"),
    _text("checksum"),
    _text("tab"),
    _text("state"),  # open, labelled, skipped or released
    sa.Column("since", sa.Float, nullable=False),
    sa.Column("active", sa.Float, nullable=False),
    _number("replaces", nullable=True),
    sa.UniqueConstraint("task", "labeler"),
)
_labels = _table(
    "labels",
    _number("assignment"),
    _text("task"),
    _text("labeler"),
    _text("value", nullable=True),
    _text("flags"),
    _number("both_bad"),
    _text("note"),
    _text("shown"),
    sa.Column("seconds", sa.Float, nullable=False),
    _text("guidelines"),
    _text("created"),
    _number("replaces", nullable=True),
    _text("submission", unique=True),
    _text("checksum"),
)
_labelers = _table(
    "labelers", _text("name"), _text("people", nullable=True), _text("created"), _text("checksum")
)
_guidelines = _table(
    "guidelines", _text("sha256", unique=True), _text("text"), _text("created"), _text("checksum")
)
_readings = _table(
    "readings", _text("labeler"), _text("sha256"), _text("created"), _text("checksum")
)
_drafts = _table("drafts", _text("draft"))
_heads = _table("heads", _text("name", unique=True), _number("rows"), _text("checksum"))

sa.Index("open_tasks", _tasks.c.id, sqlite_where=_tasks.c.taken < _tasks.c.wanted)
sa.Index("roles", _tasks.c.role)
sa.Index("states", _assignments.c.labeler, _assignments.c.state)
sa.Index("of_labeler", _labels.c.labeler)
sa.Index("readings_of", _readings.c.labeler)
sa.Index("replaced_once", _labels.c.replaces, unique=True)
sa.Index(
    "labelled_once", _labels.c.assignment, unique=True, sqlite_where=_labels.c.replaces.is_(None)
)

_INSERTS = {table.name: sa.insert(table) for table in _META.sorted_tables}

_FRESH = "NOT EXISTS (SELECT 1 FROM assignments a WHERE a.task = tasks.task AND labeler = :labeler)"
_STATEMENTS = {
    "head": "SELECT rows, checksum FROM heads WHERE name = :name",
    "set head": "UPDATE heads SET rows = :rows, checksum = :checksum WHERE name = :name",
    "task": "SELECT content FROM tasks WHERE task = :task",
    "fresh": f"SELECT content FROM tasks WHERE taken < wanted AND {_FRESH} ORDER BY id LIMIT 1",
    "fresh gold": "SELECT content, role FROM tasks WHERE role IN ('gold', 'screening') "
    f"AND {_FRESH} ORDER BY role DESC, id LIMIT 1",
    "normal": "SELECT EXISTS (SELECT 1 FROM tasks WHERE role = 'normal')",
    "had": "SELECT count(*) FROM assignments WHERE labeler = :labeler",
    "recount": "UPDATE tasks SET taken = (SELECT count(*) FROM assignments WHERE task = :task "
    "AND state IN ('open', 'labelled')) WHERE task = :task",
    "assignment": "SELECT * FROM assignments WHERE id = :id",
    "open in tab": "SELECT * FROM assignments WHERE labeler = :labeler AND state = 'open' "
    "AND tab = :tab ORDER BY replaces IS NULL, replaces, id LIMIT 1",  # corrections first
    "lying": "SELECT * FROM assignments WHERE labeler = :labeler "
    "AND state IN ('open', 'released') AND active < :before ORDER BY id LIMIT 1",
    "leave": "UPDATE assignments SET active = 0 WHERE labeler = :labeler AND tab = :tab "
    "AND state = 'open'",
    "idle": "SELECT id, task FROM assignments WHERE state = 'open' AND replaces IS NULL "
    "AND active < :before",
    "last": "SELECT a.id, l.id AS last FROM assignments a JOIN labels l ON l.assignment = a.id "
    "WHERE a.labeler = :labeler AND a.state != 'open' ORDER BY a.tab = :tab DESC, l.id DESC "
    "LIMIT 1",
    "label": "SELECT * FROM labels WHERE id = :id",
    "submitted": "SELECT * FROM labels WHERE submission = :submission",
    "assignment of": "SELECT id FROM assignments WHERE task = :task AND labeler = :labeler",
    "latest": "SELECT * FROM labels WHERE assignment = :assignment ORDER BY id DESC LIMIT 1",
    "draft": "SELECT draft FROM drafts WHERE id = :id",
    "keep draft": "INSERT OR REPLACE INTO drafts (id, draft) VALUES (:id, :draft)",
    "drop draft": "DELETE FROM drafts WHERE id = :id",
    "labeler": "SELECT * FROM labelers WHERE name = :name ORDER BY id DESC LIMIT 1",
    "guidelines": "SELECT id FROM guidelines WHERE sha256 = :sha256",
    "reading": "SELECT sha256 FROM readings WHERE labeler = :labeler ORDER BY id DESC LIMIT 1",
    "states": "SELECT state, count(*) FROM assignments WHERE labeler = :labeler GROUP BY state",
    "left": "SELECT (SELECT count(*) FROM tasks WHERE taken < wanted) - (SELECT count(*) FROM "
    "assignments a JOIN tasks t ON t.task = a.task WHERE labeler = :labeler AND taken < wanted)",
    "seconds": "SELECT seconds FROM labels WHERE labeler = :labeler ORDER BY id DESC LIMIT 50",
}  # fmt: skip
"""Statements of every request, as text: SQLAlchemy would spend more time on making them."""
_SQL = {name: sa.text(statement) for name, statement in _STATEMENTS.items()}

_NOT_CHAINED = {
    "tasks": ("role", "wanted", "taken"),
    "assignments": ("tab", "state", "since", "active", "replaces"),
    "labels": (), "labelers": (), "guidelines": (), "readings": (),
}  # fmt: skip
"""Table with checksums -> its columns that may change."""


@dataclass(frozen=True)
class Sharing:
    """Number of labels that a task gets, and share of gold items.

    Args:
        overlap: Share of the tasks that get `labels_per_overlap` labels, by different people.
        gold_share: Share of gold items in what a labeler sees.
    """

    labels_per_task: int = 1
    overlap: float = 0.0
    labels_per_overlap: int = 2
    gold_share: float = 0.0
    seed: int = 0

    def wanted(self, task: Task) -> int:
        """Return the number of labels that a task should get; 0 for gold, which all may get."""
        if task.gold is not None:
            return 0
        chosen = random.Random(f"{self.seed}/overlap/{task.id}").random() < self.overlap
        return max(self.labels_per_task, self.labels_per_overlap if chosen else 0)


class AssignmentError(UsageError):
    """A request that the state of a labeling does not allow; nothing was changed.

    A task that was answered in another tab. Go on with the next one.

    Args:
        code: answered, elsewhere, unknown, reused, nothing, labeler or guidelines.
    """

    def __init__(self, code: str, given: str, remedy: str) -> None:
        super().__init__(given, remedy=remedy)
        self.code = code


@dataclass(frozen=True)
class Assignment:
    """One task for one labeler, with the order in which its answers are shown.

    `previous` is the label to correct, in the order shown; `draft` is what a page saved.
    """

    id: int
    task: Task
    labeler: str
    order: tuple[int, ...]
    draft: Any = None
    previous: dict[str, Any] | None = None


def _json(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return check_text(text)


def now() -> str:
    """Return the time in UTC as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def task_from(content: str) -> Task:
    """Return the task of its JSON."""
    data = json.loads(content)
    answers = tuple(Answer(**one) for one in data.pop("answers"))
    return Task(prompt=tuple(data.pop("prompt")), answers=answers, **data)


class Store(SqliteFile):
    """A file with everything that a labelling project collected."""

    APPLICATION, TABLES, HOLDS = 0x4C6F5246, _META, "labels"
    EXPECTED = "the labels.sqlite of a labelling project"
    MAKE = "give the project's folder, or make one with `label --new`"

    def __init__(self, path: str | Path, sharing: Sharing | None = None) -> None:
        super().__init__(path)
        self.sharing = sharing or Sharing()
        self._totals: dict[str, tuple[float, int]] = {}

    # ------------------------------------------------------------------ opening the file

    def _opened(self, connection: Connection) -> None:
        """Compare all rows with their checksums."""
        self._verify(connection)
        if not self._readonly:
            self._share(connection)

    def _made(self, connection: Connection) -> None:
        for change in ("UPDATE", "DELETE"):
            connection.exec_driver_sql(
                f"CREATE TRIGGER no_{change.lower()} BEFORE {change} ON labels BEGIN "
                "SELECT RAISE(ABORT, 'a label is never changed'); END"
            )
        heads = [{"name": name, "rows": 0, "checksum": ""} for name in _NOT_CHAINED]
        connection.execute(sa.insert(_heads), heads)

    # -------------------------------------------------------------------------- checksums

    def _append(self, connection: Connection, table: Table, rows: list[dict[str, Any]]) -> int:
        """Add rows with their numbers and checksums; returns the number of the last."""
        head = _run(connection, "head", name=table.name).one()
        number, checksum = head.rows, head.checksum
        for row in rows:
            number += 1
            row["id"] = number
            row["checksum"] = checksum = _chained(checksum, table.name, row)
        if rows:
            connection.execute(_INSERTS[table.name], rows if len(rows) > 1 else rows[0])
            _run(connection, "set head", name=table.name, rows=number, checksum=checksum)
        return int(number)

    def _verify(self, connection: Connection) -> None:
        """Compare every row with its checksum."""
        heads = {row.name: row for row in connection.execute(sa.select(_heads))}
        for name in _NOT_CHAINED:
            table, checksum, number = _META.tables[name], "", 0
            for row in connection.execute(sa.select(table).order_by(table.c.id)).mappings():
                number += 1
                if row["id"] != number:
                    raise self._edited(f"{name[:-1]} {number} is missing")
                checksum = _chained(checksum, name, row)
                if checksum != row["checksum"]:
                    raise self._edited(f"{_described(name, row)} is not as it was written")
            head = heads.get(name)
            if head is None or (head.rows, head.checksum) != (number, checksum):
                last = head.rows if head else 0
                raise self._edited(f"{name[:-1]} {max(number, last)} was removed or added by hand")

    def _edited(self, problem: str) -> DamageError:
        return DamageError(
            problem,
            where=str(self.path),
            expected="rows that only lora-rlhf wrote: each carries a checksum",
            remedy="restore the file from a backup, with its -wal and -shm if they exist",
        )

    # ------------------------------------------------------------------------------ tasks

    def add_tasks(self, tasks: Iterable[Task]) -> dict[str, int]:
        """Add tasks, all or none; one that is there already is left as it is.

        Returns:
            How many were `added`, and how many were there `already`.

        Raises:
            DataError: Another task has the same id.
        """
        with self._transaction() as connection:
            known = connection.execute(sa.select(_tasks.c.task, _tasks.c.content))
            old = {row.task: row.content for row in known}
            rows, counts = [], Counter(added=0, already=0)
            for task in tasks:
                content = _json(asdict(task))
                if task.id in old:
                    if old[task.id] != content:
                        raise DataError(
                            f"task {task.id!r} differs from the task with this id in the project",
                            where=str(self.path),
                            expected="the same prompt and answers, or another id",
                            remedy="rename the new task, or label it in another project",
                        )
                    counts["already"] += 1
                    continue
                old[task.id] = content
                rows.append(
                    {
                        "task": task.id,
                        "content": content,
                        "role": _role(task),
                        "wanted": self.sharing.wanted(task),
                        "taken": 0,
                    }
                )
                counts["added"] += 1
            self._append(connection, _tasks, rows)
            self._totals.clear()
            return dict(counts)

    def tasks(self) -> list[Task]:
        """Return all tasks in the order in which they were added."""
        with self._transaction(reads=True) as connection:
            query = sa.select(_tasks.c.content).order_by(_tasks.c.id)
            return [task_from(content) for content in connection.execute(query).scalars()]

    def _share(self, connection: Connection) -> None:
        """Set how many labels each task should get, which the project file may have changed."""
        rows = connection.execute(sa.select(_tasks.c.id, _tasks.c.content, _tasks.c.wanted))
        changed = [
            {"number": row.id, "now": wanted}
            for row in rows
            if (wanted := self.sharing.wanted(task_from(row.content))) != row.wanted
        ]
        if changed:
            connection.execute(
                sa.update(_tasks)
                .where(_tasks.c.id == sa.bindparam("number"))
                .values(wanted=sa.bindparam("now")),
                changed,
            )

    # ----------------------------------------------------------- labelers and guidelines

    def add_labeler(self, name: str, group: str | None = None) -> None:
        """Add a labeler, or the group that they say they belong to."""
        with self._transaction() as connection:
            before = _run(connection, "labeler", name=name).first()
            if before is None or (group is not None and before.people != group):
                row = {"name": name, "people": group, "created": now()}
                self._append(connection, _labelers, [row])

    def labelers(self) -> dict[str, str | None]:
        """Return the pseudonyms, each with the group that the person gave, if any."""
        with self._transaction(reads=True) as connection:
            rows = connection.execute(sa.select(_labelers).order_by(_labelers.c.id))
            return {row.name: row.people for row in rows}

    def guidelines(self) -> dict[str, str]:
        """Return every version of the guidelines that was shown: sha256 -> text."""
        with self._transaction(reads=True) as connection:
            rows = connection.execute(sa.select(_guidelines).order_by(_guidelines.c.id))
            return {row.sha256: row.text for row in rows}

    def acknowledge(self, labeler: str, text: str) -> str:
        """Record that a labeler read these guidelines; returns their sha256."""
        sha256 = hashlib.sha256(text.encode()).hexdigest()
        with self._transaction() as connection:
            seen = _run(connection, "guidelines", sha256=sha256).first()
            row = {"sha256": sha256, "created": now()}
            if seen is None:
                self._append(connection, _guidelines, [{**row, "text": text}])
            if _reading(connection, labeler) != sha256:
                self._append(connection, _readings, [{**row, "labeler": labeler}])
        return sha256

    def acknowledged(self, labeler: str) -> str | None:
        """Return the sha256 of the guidelines that a labeler read last."""
        with self._transaction(reads=True) as connection:
            return _reading(connection, labeler)

    # ------------------------------------------------------------------------ assignments

    def next_assignment(self, labeler: str, tab: str = "") -> Assignment | None:
        """Return what this tab shows now, or assign a task to it; None if nothing is left.

        A task that was reopened by `undo` comes first.
        """
        with self._transaction(synced=False) as connection:
            row = _run(connection, "open in tab", labeler=labeler, tab=tab).first()
            if row is None and (task := self._choose(connection, labeler)) is not None:
                return self._assign(connection, labeler, tab, task)
            now, shown = time.time(), dict[str, float]()
            if row is None:
                row = _run(connection, "lying", labeler=labeler, before=now - OWN_IDLE).first()
                shown = {"since": now}  # it is shown anew
            if row is None:
                if _release(connection) and (task := self._choose(connection, labeler)) is not None:
                    return self._assign(connection, labeler, tab, task)
                return None
            _set(connection, row.id, tab=tab, state="open", active=now, **shown)
            _run(connection, "recount", task=row.task)
            return _assignment(connection, row)

    def _choose(self, connection: Connection, labeler: str) -> Task | None:
        """Choose a task: screening, gold by its share, else the first that waits for a label."""
        gold = _run(connection, "fresh gold", labeler=labeler).first()
        normal = None
        if gold is not None and gold.role != "screening":
            had = _run(connection, "had", labeler=labeler).scalar_one()
            draw = random.Random(f"{self.sharing.seed}/gold/{labeler}/{had}").random()
            if draw >= self.sharing.gold_share and _run(connection, "normal").scalar_one():
                gold = None
        if gold is None:
            normal = _run(connection, "fresh", labeler=labeler).first()
        chosen = gold or normal
        return None if chosen is None else task_from(chosen.content)

    def _assign(self, connection: Connection, labeler: str, tab: str, task: Task) -> Assignment:
        order = list(range(len(task.answers)))
        random.Random(f"{self.sharing.seed}/order/{labeler}/{task.id}").shuffle(order)
        made = {"task": task.id, "labeler": labeler, "shown": _json(order)}
        state = {"tab": tab, "state": "open", "since": time.time(), "active": time.time()}
        number = self._append(connection, _assignments, [{**made, **state, "replaces": None}])
        _run(connection, "recount", task=task.id)
        return Assignment(number, task, labeler, tuple(order))

    def submit(
        self,
        labeler: str,
        assignment: int,
        value: dict[str, Any] | None,
        *,
        tab: str = "",
        submission: str = "",
        flags: Iterable[str] = (),
        both_bad: bool = False,
        note: str = "",
    ) -> Label:
        """Save a label, or that the task is skipped, where the value is None.

        Args:
            value: In the order in which the answers were shown.
            submission: Any unique text; the same one again returns the label that it made.

        Raises:
            ValueError: The value, a flag or the note is not as expected.
            AssignmentError: The task is not this tab's, or was answered already.
        """
        flags = tuple(flag for flag in FLAGS if flag in (given := set(flags)))
        if unknown := given - {*FLAGS}:
            raise ValueError(f"flag {min(unknown)!r:.40}: expected {', '.join(FLAGS)}")
        if len(note) > LONGEST_NOTE:
            raise ValueError(f"the note has {len(note)} characters: expected {LONGEST_NOTE}")
        with self._transaction() as connection:
            if submission and (
                before := _run(connection, "submitted", submission=submission).first()
            ):
                if (before.assignment, before.labeler) == (assignment, labeler):
                    return _label(before)
                problem = "this submission belongs to another task"
                raise AssignmentError("reused", problem, "load the page again")
            row = _held(connection, labeler, assignment, tab)
            task, order = _task_of(connection, row.task), tuple(json.loads(row.shown))
            if value is not None:
                value = in_task_order(task.type, _checked(task, value), order)
            made = {
                "assignment": assignment,
                "task": task.id,
                "labeler": labeler,
                "value": None if value is None else _json(value),
                "flags": _json(flags),
                "both_bad": int(both_bad),
                "note": note,
                "shown": row.shown,
                "seconds": round(max(0.0, time.time() - row.since), 3),
                "guidelines": _reading(connection, labeler) or "",
                "created": now(),
                "replaces": row.replaces,
                "submission": submission or f"{assignment}/{row.replaces or 0}",
            }
            self._append(connection, _labels, [made])
            _set(connection, assignment, state="labelled" if value else "skipped", replaces=None)
            _run(connection, "drop draft", id=assignment)
            _run(connection, "recount", task=task.id)
            return _label(SimpleNamespace(**made))

    def skip(
        self,
        labeler: str,
        assignment: int,
        *,
        tab: str = "",
        flags: Iterable[str] = (),
        note: str = "",
    ) -> Label:
        """Record that a labeler will not answer a task, which then goes to someone else."""
        return self.submit(labeler, assignment, None, tab=tab, flags=flags, note=note)

    def undo(self, labeler: str, tab: str = "") -> Assignment:
        """Open the last task again that the labeler answered, first of all in this tab.

        Its label stays as it is until another one replaces it.
        """
        with self._transaction() as connection:
            row = _run(connection, "last", labeler=labeler, tab=tab).first()
            if row is None:
                raise AssignmentError("nothing", "there is nothing to undo", "go on")
            now = time.time()
            state = {"state": "open", "tab": tab, "since": now, "active": now}
            _set(connection, row.id, **state, replaces=row.last)
            return _assignment(connection, _run(connection, "assignment", id=row.id).one())

    def leave(self, labeler: str, tab: str) -> None:
        """Close a tab: whoever asks next gets what was open in it, the labeler or others."""
        with self._transaction(synced=False) as connection:
            _run(connection, "leave", labeler=labeler, tab=tab)

    def save_draft(self, labeler: str, assignment: int, draft: Any, *, tab: str = "") -> None:
        """Keep what a labeler has typed so far; a draft is no label, and may be overwritten."""
        with self._transaction(synced=False) as connection:
            _held(connection, labeler, assignment, tab)
            row = {"id": assignment, "draft": _json(draft)}
            _run(connection, "keep draft", **row)
            _set(connection, assignment, active=time.time())

    def assigned(self, labeler: str, assignment: int) -> Assignment:
        """Return an open assignment of a labeler.

        Raises:
            AssignmentError: It is not open, or not theirs.
        """
        with self._transaction(reads=True) as connection:
            return _assignment(connection, _held(connection, labeler, assignment, None))

    # ----------------------------------------------------------------------------- labels

    def labels(self, current: bool = True) -> list[Label]:
        """Return the labels in the order in which they were given.

        Args:
            current: Leave out those that a later one replaced.
        """
        with self._transaction(reads=True) as connection:
            rows = connection.execute(sa.select(_labels).order_by(_labels.c.id)).all()
        replaced = {row.replaces for row in rows} if current else set()
        return [_label(row) for row in rows if row.id not in replaced]

    def add_labels(self, labels: Iterable[Label]) -> dict[str, int]:
        """Add labels that were given elsewhere, all or none; one that differs replaces the older.

        Their `id` and `replaces` are not read; without `created` they are of now.

        Returns:
            How many were `added`, and how many were there `already`.

        Raises:
            ValueError: A value has not the form of its task.
            DataError: There is no such task.
        """
        counts = Counter(added=0, already=0)
        with self._transaction() as connection:
            for label in labels:
                counts["added" if self._add_label(connection, label) else "already"] += 1
        return dict(counts)

    def _add_label(self, connection: Connection, label: Label) -> bool:
        if (content := _run(connection, "task", task=label.task).scalar()) is None:
            raise DataError(f"there is no task {label.task!r:.60}", where=str(self.path))
        task, value, about = task_from(content), label.value, {"labeler": label.labeler}
        if value is not None:
            value = check_value(task.type, value, len(task.answers))
        given = {
            "value": None if value is None else _json(value),
            "flags": _json(label.flags),
            "both_bad": int(label.both_bad),
            "note": label.note,
        }
        number = _run(connection, "assignment of", task=task.id, **about).scalar()
        old = number and _run(connection, "latest", assignment=number).first()
        if old and label.created and label.created <= old.created:
            return False
        if old and all(getattr(old, key) == one for key, one in given.items()):
            return False
        if _run(connection, "labeler", name=label.labeler).first() is None:
            row = {"name": label.labeler, "people": None, "created": now()}
            self._append(connection, _labelers, [row])
        shown, moment = _json(label.order), time.time()
        if number is None:
            state = {"tab": "", "state": "open", "since": moment, "active": moment}
            made = {"task": task.id, **about, "shown": shown, **state, "replaces": None}
            number = self._append(connection, _assignments, [made])
        replaced = old.id if old else None
        added = {
            "assignment": number, "task": task.id, **about, **given, "shown": shown,
            "seconds": label.seconds, "guidelines": label.guidelines,
            "created": label.created or now(), "replaces": replaced,
            "submission": f"added/{number}/{replaced or 0}",
        }  # fmt: skip
        self._append(connection, _labels, [added])
        _set(connection, number, state="labelled" if value else "skipped", replaces=None)
        _run(connection, "drop draft", id=number)
        _run(connection, "recount", task=task.id)
        return True

    def progress(self, labeler: str) -> dict[str, Any]:
        """Count what a labeler did and what is left for them; seconds are those of the last 50."""
        with self._transaction(reads=True) as connection:
            states = dict(map(tuple, _run(connection, "states", labeler=labeler)))
            mine = sum(states.get(state, 0) for state in ("labelled", "skipped", "open"))
            since, total = self._totals.get(labeler, (-TOTAL_SECONDS, 0))
            if time.monotonic() - since >= TOTAL_SECONDS:
                total = mine + _run(connection, "left", labeler=labeler).scalar_one()
                self._totals[labeler] = time.monotonic(), total
            seconds = _run(connection, "seconds", labeler=labeler).scalars()
            median = statistics.median(list(seconds) or [0.0])
        done = mine - states.get("open", 0)
        return {"done": done, "total": max(total, mine), "seconds_median": round(median, 1)}


def _chained(before: str, table: str, row: Any) -> str:
    """Hash what never changes in a row, after the checksum of the row before it."""
    skipped = ("checksum", *_NOT_CHAINED[table])
    content = {key: value for key, value in row.items() if key not in skipped}
    return hashlib.sha256(f"{before}{table}{_json(content)}".encode()).hexdigest()


def _described(table: str, row: Any) -> str:
    """Name a record for an error."""
    about = {"labels": "task", "assignments": "task", "tasks": "task", "labelers": "name"}
    key, by = about.get(table), f" by {row['labeler']}" if "labeler" in row else ""
    return f"{table[:-1]} {row['id']}" + (f" ({row[key]}{by})" if key else by)


def _role(task: Task) -> str:
    gold = task.gold is not None
    return "normal" if not gold else "screening" if task.why == SCREENING else "gold"


def _run(connection: Connection, statement: str, /, **values: Any) -> Any:
    """Execute one of the statements."""
    return connection.execute(_SQL[statement], values)


def _release(connection: Connection) -> bool:
    """Give tasks that labelers left open long ago to others; a late answer still counts."""
    rows = _run(connection, "idle", before=time.time() - IDLE).all()
    for row in rows:
        _set(connection, row.id, state="released")
        _run(connection, "recount", task=row.task)
    return bool(rows)


def _set(connection: Connection, assignment: int, **values: Any) -> None:
    query = sa.update(_assignments).where(_assignments.c.id == assignment).values(**values)
    connection.execute(query)


def _held(connection: Connection, labeler: str, assignment: int, tab: str | None) -> Row[Any]:
    """Return an open assignment of a labeler, in this tab if one is given."""
    row: Row[Any] | None = _run(connection, "assignment", id=assignment).first()
    if row is None or row.labeler != labeler:
        raise AssignmentError("unknown", f"{labeler} has no task {assignment}", "go on")
    if row.state in ("labelled", "skipped"):
        raise AssignmentError(
            "answered", "this task was answered already", "go on; use undo to correct the answer"
        )
    if tab is not None and row.tab != tab:
        raise AssignmentError(
            "elsewhere", "this task is open in another tab", "go on here with the next task"
        )
    return row


def _checked(task: Task, value: dict[str, Any]) -> dict[str, Any]:
    """Return a value of the task's form; a demonstration must also keep the task's checks."""
    value = check_value(task.type, value, len(task.answers))
    if task.checks and (wrong := answer_format.problems(value["text"], task.checks)):
        raise ValueError("; ".join(wrong))
    return value


def _task_of(connection: Connection, task: str) -> Task:
    return task_from(_run(connection, "task", task=task).scalar_one())


def _assignment(connection: Connection, row: Row[Any]) -> Assignment:
    """Return an assignment with its draft and the label that it corrects."""
    task, order = _task_of(connection, row.task), tuple(json.loads(row.shown))
    draft = _run(connection, "draft", id=row.id).scalar()
    previous = None
    if row.replaces is not None:
        old = _label(_run(connection, "label", id=row.replaces).one())
        previous = {
            "value": old.value and in_shown_order(task.type, old.value, order),
            "flags": list(old.flags),
            "both_bad": old.both_bad,
            "note": old.note,
        }
    return Assignment(row.id, task, row.labeler, order, draft and json.loads(draft), previous)


def _reading(connection: Connection, labeler: str) -> str | None:
    sha256: str | None = _run(connection, "reading", labeler=labeler).scalar()
    return sha256


def _label(row: Any) -> Label:
    return Label(
        id=row.id,
        task=row.task,
        labeler=row.labeler,
        value=None if row.value is None else json.loads(row.value),
        flags=tuple(json.loads(row.flags)),
        both_bad=bool(row.both_bad),
        note=row.note,
        order=tuple(json.loads(row.shown)),
        seconds=row.seconds,
        guidelines=row.guidelines,
        created=row.created,
        replaces=row.replaces,
    )
