# SPDX-License-Identifier: Apache-2.0
"""The store: one label an assignment, none overwritten, edits and damage noticed."""

import itertools
import os
import random
import signal
import sqlite3
import threading
import time
from collections import Counter
from dataclasses import replace

import killed
import pytest

from lora_rlhf.errors import (
    BusyError,
    DamageError,
    DataError,
    DiskError,
    SetupError,
    UsageError,
)
from lora_rlhf.feedback import store as store_module
from lora_rlhf.feedback.labels import Answer, Task
from lora_rlhf.feedback.store import AssignmentError, Sharing, Store


def task(name="t0", answers=3, kind="ranking", **fields):
    prompt = ({"role": "user", "content": f"prompt of {name}"},)
    texts = tuple(Answer(f"m{i}", f"answer {i} of {name}") for i in range(answers))
    return Task(str(name), kind, prompt, texts, **fields)


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "labels.sqlite").open(create=True) as opened:
        yield opened


def fill(store, count=4, **fields):
    store.add_tasks(task(f"t{i}", **fields) for i in range(count))
    return store


def label(store, labeler="anna", tab="", **options):
    given = store.next_assignment(labeler, tab)
    options.setdefault("value", {"ranks": [1, 2, 3]})
    return store.submit(labeler, given.id, tab=tab, **options)


def again(store, **options):
    store.close()
    return Store(store.path, **options).open()


# ------------------------------------------------------------------------------- labels


def test_a_label_is_saved_in_the_tasks_own_order(store):
    fill(store)
    for _ in range(4):
        given = store.next_assignment("anna")
        made = store.submit("anna", given.id, {"ranks": [1, 2, 3]}, flags=["harmful"], note="n")
        assert made.order == given.order
        assert [made.value["ranks"][index] for index in made.order] == [1, 2, 3]
    assert len({one.order for one in store.labels()}) > 1
    assert (made.flags, made.note, made.labeler, made.replaces) == (("harmful",), "n", "anna", None)
    assert store.next_assignment("anna") is None
    assert again(store).labels() == store.open().labels()


def test_the_stronger_of_a_pair_is_the_same_answer_in_both_orders(store):
    fill(store, 8, answers=2, kind="pair")
    for _ in range(8):
        given = store.next_assignment("anna")
        shown = -2 if given.order == (1, 0) else 2  # always for the task's second answer
        assert store.submit("anna", given.id, {"strength": shown}).value == {"strength": 2}
    assert {one.order for one in store.labels()} == {(0, 1), (1, 0)}


def test_a_double_submit_gives_one_record(store):
    fill(store)
    given = store.next_assignment("anna")
    first = store.submit("anna", given.id, {"ranks": [1, 1, 1]}, submission="s")
    assert store.submit("anna", given.id, {"ranks": [1, 2, 3]}, submission="s") == first
    with pytest.raises(AssignmentError, match="answered already"):
        store.submit("anna", given.id, {"ranks": [1, 2, 3]}, submission="another")
    other = store.next_assignment("anna")
    with pytest.raises(AssignmentError, match="belongs to another task"):
        store.submit("anna", other.id, {"ranks": [1, 2, 3]}, submission="s")
    assert store.labels() == [first]


def test_a_correction_is_a_new_row(store):
    fill(store)
    first = label(store)
    label(store, value={"ranks": [2, 2, 1]})
    given = store.undo("anna")
    assert given.previous["value"] == {"ranks": [2, 2, 1]}
    assert store.undo("anna").task.id == first.task
    assert store.next_assignment("anna").task.id == first.task  # also after a reload
    new = store.submit("anna", store.next_assignment("anna").id, {"ranks": [3, 2, 1]})
    assert new.replaces == first.id and new.value != first.value
    assert [one.id for one in store.labels()] == [2, 3]
    assert store.labels(current=False)[0] == first
    assert store.next_assignment("anna").id == given.id  # reopened before, and still waiting
    with sqlite3.connect(store.path) as raw, pytest.raises(sqlite3.Error, match="never changed"):
        raw.execute("UPDATE labels SET value = 'x'")
    with pytest.raises(AssignmentError, match="nothing to undo"):
        store.undo("bob")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"value": {"ranks": [1, 2]}}, "expected 3"),
        ({"flags": ["rude"]}, "flag 'rude'"),
        ({"note": "x" * 5_001}, "note has 5001"),
    ],
)
def test_what_is_no_label_is_refused_and_leaves_nothing(store, options, problem):
    fill(store)
    with pytest.raises(ValueError, match=problem):
        label(store, **options)
    assert store.labels() == []
    assert label(store).id == 1


def test_a_demonstration_keeps_the_checks_of_its_task(store):
    turns = ({"role": "user", "content": "Tea?"},)
    store.add_tasks([Task("d", "demonstration", turns, (), checks={"max_words": 2})])
    with pytest.raises(ValueError, match="3 words, at most 2 are allowed"):
        label(store, value={"text": "far too long"})
    assert store.labels() == [] and label(store, value={"text": "just so"}).id == 1


def test_a_draft_waits_until_the_label(store):
    fill(store, kind="demonstration", answers=0)
    given = store.next_assignment("anna")
    store.save_draft("anna", given.id, {"text": "so f"})
    store.save_draft("anna", given.id, {"text": "so far"})
    assert again(store).next_assignment("anna").draft == {"text": "so far"}
    store.open()
    store.submit("anna", given.id, {"text": "so far, so good"})
    with pytest.raises(AssignmentError):
        store.save_draft("anna", given.id, {"text": "late"})
    assert store.next_assignment("anna").draft is None


# -------------------------------------------------------------------------- assignments


def test_no_two_tabs_or_labelers_get_the_same_assignment(store):
    fill(store, 40)
    given, lock = [], threading.Lock()

    def work(labeler, tab):
        while (one := store.next_assignment(labeler, tab)) is not None:
            store.submit(labeler, one.id, {"ranks": [1, 2, 3]}, tab=tab)
            with lock:
                given.append(one)

    people = itertools.product(("anna", "bob", "cleo"), ("1", "2"))
    threads = [threading.Thread(target=work, args=args) for args in people]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert max(Counter(one.task.id for one in given).values()) == 1
    assert len(given) == len(store.labels()) == 40


def test_two_processes_share_a_store(store):
    fill(store, 30)

    def work(labeler):
        with Store(store.path).open() as mine:
            while (one := mine.next_assignment(labeler)) is not None:
                mine.submit(labeler, one.id, {"ranks": [1, 2, 3]})

    store.close()
    children = [killed.start(work, name) for name in ("anna", "bob")]
    assert [killed.wait(child) for child in children] == [0, 0]
    assert Counter(one.task for one in store.open().labels()) == {f"t{i}": 1 for i in range(30)}


def test_a_reload_gets_the_same_and_another_tab_another(store):
    fill(store)
    first = store.next_assignment("anna", "tab 1")
    assert store.next_assignment("anna", "tab 1") == first
    second = store.next_assignment("anna", "tab 2")
    assert second.id != first.id
    with pytest.raises(AssignmentError, match="in another tab"):
        store.submit("anna", first.id, {"ranks": [1, 2, 3]}, tab="tab 2")
    with pytest.raises(AssignmentError, match="bob has no task 1"):
        store.submit("bob", first.id, {"ranks": [1, 2, 3]}, tab="tab 1")


def test_a_skipped_task_goes_to_someone_else(store):
    fill(store, 1)
    made = store.skip("anna", store.next_assignment("anna").id, flags=["broken"])
    assert (made.value, made.flags) == (None, ("broken",))
    assert store.next_assignment("anna") is None
    assert label(store, "bob").task == "t0"


def test_what_was_left_open_is_given_again_later(store, monkeypatch):
    fill(store, 1)
    left = store.next_assignment("anna", "closed tab")
    assert store.next_assignment("anna", "new tab") is None
    monkeypatch.setattr(store_module, "OWN_IDLE", -1.0)
    assert store.next_assignment("anna", "new tab").id == left.id
    assert store.next_assignment("bob") is None
    monkeypatch.setattr(store_module, "IDLE", -1.0)
    assert label(store, "bob").task == "t0"
    assert label(store, "anna", tab="new tab").task == "t0"  # late, and not lost


def test_the_seconds_of_a_task_that_lay_open_begin_when_it_is_shown_again(store, monkeypatch):
    fill(store, 1)
    store.next_assignment("anna", "yesterday's tab")
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 80_000)
    assert label(store, "anna", tab="new tab").seconds < 1_000


def test_a_share_of_the_tasks_is_done_twice(tmp_path):
    sharing = Sharing(overlap=0.3, seed=1)
    with Store(tmp_path / "s", sharing).open(create=True) as store:
        fill(store, 50)
        for name in ("anna", "bob", "cleo"):
            while store.next_assignment(name):
                label(store, name)
        counts = Counter(one.task for one in store.labels())
        assert {*counts.values()} == {1, 2} and 8 <= len(store.labels()) - 50 <= 22
        assert len({(one.task, one.labeler) for one in store.labels()}) == len(store.labels())
    with Store(tmp_path / "s", Sharing(labels_per_task=4)).open() as store:
        assert store.progress("dora")["total"] == 50  # the project file was changed


def test_everyone_meets_gold_items_and_screening_first(tmp_path):
    value = {"ranks": [1, 2, 3]}
    with Store(tmp_path / "s", Sharing(gold_share=0.5)).open(create=True) as store:
        fill(store, 20)
        store.add_tasks(task(f"gold{i}", gold=value) for i in range(5))
        store.add_tasks(task(f"test{i}", gold=value, why="screening") for i in range(2))
        for name in ("anna", "bob"):
            mine = [label(store, name).task for _ in range(12)]
            assert mine[:2] == ["test0", "test1"]
            assert sum(one.startswith("gold") for one in mine) >= 2
            assert len({*mine}) == 12


def test_progress_counts_what_is_left_for_a_labeler(store):
    fill(store)
    label(store)
    label(store, "bob")
    assert store.next_assignment("anna")
    progress = store.progress("anna")
    assert (progress["done"], progress["total"]) == (1, 3)


def test_groups_and_guidelines_are_rows_as_well(store):
    store.add_labeler("anna")
    store.add_labeler("bob", "a nurse")
    store.add_labeler("anna", "over 60")
    store.add_labeler("anna")
    assert store.labelers() == {"anna": "over 60", "bob": "a nurse"}
    first = store.acknowledge("anna", "be kind")
    assert store.acknowledge("anna", "be kind") == first == store.acknowledged("anna")
    second = store.acknowledge("anna", "be kind and right")
    fill(store)
    assert label(store).guidelines == second
    assert list(store.guidelines().values()) == ["be kind", "be kind and right"]
    assert store.acknowledged("bob") is None


# ------------------------------------------------------------------------------- faults


def test_a_task_with_the_same_id_and_other_answers_is_refused(store):
    fill(store)
    assert store.add_tasks([task("t0"), task("t9")]) == {"added": 1, "already": 1}
    with pytest.raises(DataError, match=r"labels.sqlite: task 't0' differs"):
        store.add_tasks([task("t10"), task("t0", answers=2)])
    assert [one.id for one in store.tasks()] == ["t0", "t1", "t2", "t3", "t9"]


EDITS = [
    ("UPDATE labels SET value = replace(value, '1', '2') WHERE id = 2", "label 2 (t1 by anna) is"),
    ("UPDATE labels SET labeler = 'eve' WHERE id = 3", "label 3 (t2 by eve) is"),
    ("DELETE FROM labels WHERE id = 2", "label 2 is missing"),
    ("DELETE FROM labels WHERE id = 3", "label 3 was removed"),
    ("UPDATE tasks SET content = replace(content, 'answer', 'x') WHERE id = 2", "task 2 (t1) is"),
    ("UPDATE assignments SET shown = '[0,1,2]', labeler = 'x' WHERE id = 1", "assignment 1"),
    ("UPDATE labelers SET people = 'rich'", "labeler 1 (anna) is"),
    ("UPDATE guidelines SET text = 'be rude'", "guideline 1 is"),
    ("UPDATE readings SET labeler = 'bob'", "reading 1 by bob is"),
    ("DELETE FROM heads WHERE name = 'labels'", "label 3 was removed"),
]  # fmt: skip


@pytest.mark.parametrize(("edit", "problem"), EDITS)
def test_an_edited_store_is_noticed(store, edit, problem):
    fill(store)
    store.add_labeler("anna")
    store.acknowledge("anna", "be kind")
    for _ in range(3):
        label(store)
    store.close()
    with sqlite3.connect(store.path) as raw:
        raw.execute("DROP TRIGGER no_update")
        raw.execute("DROP TRIGGER no_delete")
        raw.execute(edit)
    raw.close()
    with pytest.raises(DamageError) as error:
        store.open()
    assert problem in error.value.given and str(store.path) == error.value.where
    store.path.unlink()


def test_a_damaged_file_is_one_error(store):
    fill(store, 300)
    store.close()
    raw = bytearray(store.path.read_bytes())
    for start in range(4096, len(raw), 4096):
        raw[start : start + 64] = b"x" * 64
    store.path.write_bytes(raw)
    with pytest.raises(DamageError, match=r"labels.sqlite: the store is damaged: .*SQLITE_CORRUPT"):
        store.open()
    store.path.write_bytes(b"these are no labels" * 100)
    with pytest.raises(UsageError, match="this is not a SQLite file"):
        store.open()


def test_a_store_of_another_version_or_program_is_refused(store):
    def change(statement):
        store.close()
        raw = sqlite3.connect(store.path)
        raw.execute(statement)
        raw.close()

    change(f"PRAGMA user_version = {Store.VERSION + 1}")
    with pytest.raises(SetupError, match=r"labels.sqlite: the store has version 2\n.*version 1\n"):
        store.open()
    change("PRAGMA application_id = 1")
    with pytest.raises(SetupError, match="not made by lora-rlhf"):
        store.open()
    with pytest.raises(UsageError, match="no store of labels here"):
        Store(store.path.with_name("other")).open()


def test_an_older_store_is_migrated_with_its_labels(store, monkeypatch):
    label(fill(store))
    monkeypatch.setattr(Store, "VERSION", 2)
    step = ("ALTER TABLE drafts ADD COLUMN saved TEXT",)
    monkeypatch.setattr(Store, "MIGRATIONS", {1: step})
    store.close()
    with pytest.raises(SetupError, match="version 1"):
        store.open(readonly=True)
    assert len(again(store).labels()) == 1
    assert again(store).labels()
    with sqlite3.connect(store.path) as raw:
        assert "saved" in [row[1] for row in raw.execute("PRAGMA table_info(drafts)")]


def test_a_locked_store_is_one_error(store, monkeypatch):
    monkeypatch.setattr(Store, "BUSY_SECONDS", 0.05)
    other = sqlite3.connect(fill(store).path, isolation_level=None)
    again(store)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(BusyError, match=r"labels.sqlite: another process has kept"):
        Store(store.path).open()
    other.close()


def test_a_store_that_cannot_be_written_is_one_error_and_can_be_read(store):
    if os.geteuid():
        pytest.skip("only root can become a user who may not write")
    label(fill(store))
    store.close()
    folder = store.path.parent

    def try_it():
        os.seteuid(65534)
        with pytest.raises(DiskError, match=r"labels.sqlite: the store cannot be written"):
            Store(store.path).open()
        assert len(Store(store.path).open(readonly=True).labels()) == 1

    modes = [(path, path.stat().st_mode) for path in (folder, *folder.parents)][:-2]
    try:
        for path, mode in modes:
            path.chmod(mode | 0o055)
        assert killed.wait(killed.start(try_it)) == 0
    finally:
        for path, mode in modes:
            path.chmod(mode)


def test_the_disk_is_full(store):
    fill(store)
    engine = store._engine
    with engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(DiskError, match="is full"):
        store.add_tasks(task(f"more{i}") for i in range(100))
    assert len(store.tasks()) == 4


# -------------------------------------------------------------------------------- kills


def judge(path, acknowledged):
    """Label until killed, and write each label's task to the pipe once it is saved."""
    with Store(path).open() as store:
        while (one := store.next_assignment("anna")) is not None:
            store.submit("anna", one.id, {"ranks": [1, 2, 3]})
            os.write(acknowledged, f"{one.task.id}\n".encode())


def label_and_kill(store, kills, count):
    """Label in processes that are killed at random moments; returns the acknowledged tasks."""
    rng, saved = random.Random(0), []
    fill(store, count)
    store.close()
    points = [*sorted(rng.sample(range(1, int(0.95 * count)), kills)), None]
    for point in points:
        read, write = os.pipe()
        child = killed.start(judge, store.path, write)
        os.close(write)
        with os.fdopen(read) as lines:
            for line in lines:
                saved.append(line.strip())
                if point is not None and len(saved) >= point:
                    time.sleep(rng.uniform(0, 0.02))
                    os.kill(child, signal.SIGKILL)
                    point = None
            killed.wait(child)
    labels = [one.task for one in store.open().labels()]
    assert {*saved} <= {*labels} and len({*labels}) == len(labels) == count
    return {*saved}


def test_a_killed_process_loses_no_acknowledged_label(store):
    assert len(label_and_kill(store, 4, 120)) >= 116  # at most one a kill was not acknowledged


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_hundred_kills_over_ten_thousand_labels(store):
    start = time.monotonic()
    saved = label_and_kill(store, 100, 10_000)
    print(
        f"\n100 kills, 10,000 labels: {len(saved)} acknowledged, none lost, "
        f"{10_000 - len(saved)} saved without the answer having arrived, "
        f"{time.monotonic() - start:.0f} s"
    )
    assert len(saved) >= 9_900


def test_an_unfinished_addition_of_tasks_leaves_none(store):
    def half():
        yield task("a")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.add_tasks(half())
    assert store.tasks() == [] and replace(task("a")) == task("a")
    assert store.add_tasks([task("a")]) == {"added": 1, "already": 0}
