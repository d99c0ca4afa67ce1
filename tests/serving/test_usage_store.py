# SPDX-License-Identifier: Apache-2.0
"""The store of use: numbers of requests, text only with a thumb."""

import sqlite3
import stat

import pytest

from lora_rlhf.errors import SetupError, UsageError
from lora_rlhf.serving.usage_store import LONGEST_COMMENT, UsageStore, Use, new_id

PROMPT = [{"role": "user", "content": "a very private question"}]


@pytest.fixture
def store(tmp_path):
    with UsageStore(tmp_path / "usage.sqlite") as opened:
        yield opened


def test_a_request_leaves_numbers_and_no_text(store):
    use = Use(new_id(), "serve", "policy", "ab12", prompt_tokens=5, seconds=0.5, prompt=PROMPT)
    store.record(use)
    store.record(Use(new_id(), "chat", "policy", "ab12", prompt=PROMPT, valid=False))
    store.record(Use(new_id(), "do", "sft", prompt=[{"role": "user", "content": "other"}]))
    first, second, third = store.uses()
    assert (first["id"], first["prompt_tokens"], first["seconds"]) == (use.id, 5, 0.5)
    assert (first["valid"], second["valid"], first["thumbs"]) == (None, False, {})
    assert first["prompt"] == second["prompt"] != third["prompt"]  # found again by its hash
    raw = b"".join(path.read_bytes() for path in store.path.parent.iterdir())
    assert b"private" not in raw and store.knows(use.id) and not store.knows("other")
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o600


def test_the_hash_of_a_prompt_is_not_that_of_another_file(store, tmp_path):
    with UsageStore(tmp_path / "other.sqlite") as other:
        for each in (store, other):
            each.record(Use(new_id(), "chat", "base", prompt=PROMPT))
        assert store.uses()[0]["prompt"] != other.uses()[0]["prompt"]


def test_the_last_thumb_counts_and_those_down_are_tasks(store):
    for name in ("one", "two", "three"):
        store.record(Use(name, "chat", "policy"))
    store.thumb("one", True, messages=PROMPT, answer="a")
    store.thumb("one", False, "wrong", PROMPT, "a", model="policy")
    store.thumb("two", True, messages=PROMPT, answer="b")
    store.thumb("three", False)  # without its text
    store.thumb("two", False, choice=2)  # on another of its answers
    thumbs = [use["thumbs"] for use in store.uses()]
    assert thumbs == [{0: False}, {0: True, 2: False}, {0: False}]
    [task] = store.tasks()
    assert (task["messages"], task["answer"], task["comment"]) == (PROMPT, "a", "wrong")
    with pytest.raises(UsageError, match="comment has 5001 characters"):
        store.thumb("one", True, "x" * (LONGEST_COMMENT + 1))


def test_it_is_opened_again_and_by_two_at_once(store):
    store.record(Use("one", "chat", "base"))
    with UsageStore(store.path).open() as second:
        second.record(Use("two", "chat", "base"))
        assert [use["id"] for use in store.uses()] == ["one", "two"]
    assert len(UsageStore(store.path).open(readonly=True).uses()) == 2


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "labels.sqlite"
    raw = sqlite3.connect(path)
    raw.executescript("CREATE TABLE tasks (id INTEGER); PRAGMA application_id = 1")
    raw.close()
    before = path.read_bytes()
    with pytest.raises(SetupError, match="not made by lora-rlhf"):
        UsageStore(path).open()
    assert path.read_bytes() == before
    with pytest.raises(UsageError, match="no store of uses here"):
        UsageStore(tmp_path / "none.sqlite").open(readonly=True)
    assert not (tmp_path / "none.sqlite").exists()
