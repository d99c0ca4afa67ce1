# SPDX-License-Identifier: Apache-2.0
"""OpenAssistant's trees and messages as inputs of a recipe."""

from collections import Counter

import pytest
from data_sources import all_rows, jsonl, recipe

from lora_rlhf.data import dataset_builder, message_trees
from lora_rlhf.errors import DataError

WHERE = "oasst.jsonl:1"


def message(name, role, text, *replies, **changes):
    """A node as in 2023-04-12_oasst_ready.trees.jsonl."""
    given = {"message_id": name, "parent_id": None, "text": text, "role": role, "lang": "en"}
    given |= {"review_count": 3, "review_result": True, "deleted": False, "rank": None}
    given |= {"synthetic": False, "model_name": None, "emojis": {"+1": 2}, "replies": [*replies]}
    for reply in replies:
        reply["parent_id"] = name
    return given | changes


def tree(**changes):
    follow_up = message(
        "q2", "prompter", "And of Peru?",
        message("a5", "assistant", "Lima.", rank=0), rank=0,
    )  # fmt: skip
    root = message(
        "q1", "prompter", "Capital of Chile?",
        message("a1", "assistant", "Perhaps Lima", rank=2),
        message("a2", "assistant", "Santiago.", follow_up, rank=0),
        message("a3", "assistant", "Santiago, I think", rank=1),
        message("a4", "assistant", "Buy this", rank=3, deleted=True),
        message("a6", "assistant", "Das ist Santiago", rank=4, lang="de"),
        message("a7", "assistant", "as an AI", rank=5, synthetic=True),
        message("a8", "assistant", "not ranked"),
    )  # fmt: skip
    return {"message_tree_id": "q1", "tree_state": "ready_for_export", "prompt": root | changes}


def flat(node):
    """The rows of OpenAssistant/oasst1: one a message, in no helpful order."""
    replies = node.pop("replies")
    node |= {"user_id": f"u-{node['message_id']}", "message_tree_id": "q1", "detoxify": None}
    return [*(row for reply in replies for row in flat(reply)), node]


def read(rows, name, lang=None):
    notes = Counter()
    made = message_trees.rows_of([(WHERE, row) for row in rows], name, lang, notes)
    return [row for _, row in made], notes


def test_comparisons_are_the_ranked_replies_to_a_question():
    rows, notes = read([tree()], "comparisons", "en")
    [row] = rows  # the follow-up has one reply
    assert row["prompt"] == [{"role": "user", "content": "Capital of Chile?"}]
    assert row["completions"] == ["Perhaps Lima", "Santiago.", "Santiago, I think"]
    assert row["ranks"] == [3, 1, 2]
    for reason in ("deleted", "synthetic", "in other languages"):
        assert notes[f"messages of trees that are {reason} were left out, with their replies"] == 1


def test_demonstrations_are_the_best_replies_and_prompts_the_questions():
    rows, _ = read([tree()], "demonstrations")
    assert [row["messages"][-1]["content"] for row in rows] == ["Santiago.", "Lima."]
    assert [turn["role"] for turn in rows[1]["messages"]] == ["user", "assistant"] * 2
    rows, _ = read([tree()], "prompts")
    assert [row["prompt"][-1]["content"] for row in rows] == ["Capital of Chile?", "And of Peru?"]


def test_messages_in_any_order_are_the_same_trees_with_their_user():
    rows, _ = read(flat(tree()["prompt"]), "demonstrations")
    assert [row.pop("user") for row in rows] == ["u-q1", "u-q1"]
    assert rows == read([tree()], "demonstrations")[0]
    orphan = [row for row in flat(tree()["prompt"]) if row["message_id"] != "a2"]
    _, notes = read(orphan, "prompts")
    assert notes["replies to a message that is not in the file were left out"] == 1


@pytest.mark.parametrize(
    ("row", "options", "problem"),
    [
        (tree(role="moderator"), {}, "no message of a tree"),
        (tree(text=None), {}, "no message of a tree"),
        (tree(deleted=True), {}, "is of use for comparisons: 1 messages of trees that are deleted"),
        ({"prompt": "q", "completion": "a"}, {"lang": "en"}, "the rows are no message trees"),
    ],
)
def test_what_is_no_tree_is_one_error(row, options, problem):
    with pytest.raises(DataError) as error:
        read([row], "comparisons", **options)
    assert problem in error.value.given and error.value.where == WHERE


def test_a_recipe_reads_them(tmp_path, chat):
    trees = [tree(text=f"Capital of country {number}?") for number in range(20)]
    source = {"path": str(jsonl(tmp_path / "oasst.jsonl", trees)), "lang": "en"}
    pairs = dataset_builder.comparisons(recipe(comparisons=source, held_out=0.5), chat)
    assert {row["chosen"][0]["content"] for row in all_rows(pairs)} == {
        "Santiago.",
        "Santiago, I think",
    }
    assert "rows made of message trees (20 rows)" in pairs.report["notes"]
