# SPDX-License-Identifier: Apache-2.0
"""A column `user`: a cap for each user, and a split that keeps users on one side."""

import pytest
from data_sources import all_rows, jsonl, recipe, removed

from lora_rlhf.data import dataset_builder
from lora_rlhf.errors import DataError


def rows(users, each):
    return [{"prompt": f"{user} asks {i}", "completion": "a", "user": user}
            for user in range(users) for i in range(each)]  # fmt: skip


def test_users_are_capped_and_on_one_side(tmp_path, plain):
    given = [*rows(40, 5), *({**row, "completion": "b"} for row in rows(40, 5))]
    given += [{"prompt": f"flood {i}", "completion": "c", "user": "flood"} for i in range(203)]
    source = recipe(demonstrations=jsonl(tmp_path / "d.jsonl", given), held_out=0.3)
    prepared = dataset_builder.demonstrations(source, plain)
    assert removed(prepared, "over data.max_prompts_per_user = 200") == 3
    assert prepared.report["users"] == 41
    sides = [{row["prompt"].split()[0] for row in side}
             for side in (prepared.train, prepared.held_out)]  # fmt: skip
    assert sides[0] and sides[1] and not sides[0] & sides[1]
    assert "user" not in next(iter(prepared.train))
    assert len(all_rows(prepared)) == 600  # two answers to one prompt count once


def test_a_held_out_users_prompts_are_not_trained_on(tmp_path, plain):
    given = [{"prompt": f"same {i % 30}", "completion": f"a{i}", "user": i} for i in range(300)]
    given += [{"prompt": f"own {i}", "completion": "a", "user": f"u{i}"} for i in range(200)]
    prepared = dataset_builder.demonstrations(
        recipe(demonstrations=jsonl(tmp_path / "d.jsonl", given), held_out=0.1), plain
    )
    train, held_out = ({row["prompt"] for row in side}
                       for side in (prepared.train, prepared.held_out))  # fmt: skip
    assert not train & held_out
    assert removed(prepared, "prompts that a held-out user wrote too") > 0


def test_prompts_that_users_hold_out_are_trained_on_in_no_set(tmp_path, plain):
    named = rows(40, 5)
    files = [jsonl(tmp_path / "named.jsonl", named),
             jsonl(tmp_path / "bare.jsonl", [{**row, "user": None} for row in named])]  # fmt: skip
    given = recipe(demonstrations=files[1], prompts=files[0], held_out=0.2)
    loaded = {}
    trained = {r["prompt"] for r in dataset_builder.demonstrations(given, plain, loaded).train}
    asked = {r["prompt"] for r in dataset_builder.prompts(given, plain, loaded).held_out}
    assert asked and trained and not trained & asked


def test_a_column_that_is_no_user_stops_the_run(tmp_path, plain):
    given = [{"prompt": f"q{i}", "completion": "a", "user": "all"} for i in range(600)]
    source = {"path": str(jsonl(tmp_path / "d.jsonl", given))}
    with pytest.raises(DataError, match="max_prompts_per_user") as caught:
        dataset_builder.demonstrations(recipe(demonstrations=source, max_lost=0.2), plain)
    assert "ignore: [user]" in caught.value.remedy
    ignored = recipe(demonstrations={**source, "ignore": ["user"]})
    assert len(all_rows(dataset_builder.demonstrations(ignored, plain))) == 600
    bad = jsonl(tmp_path / "bad.jsonl", [{"prompt": "q", "completion": "a", "user": [1]}])
    with pytest.raises(DataError, match=r"column 'user' must be a name or a number"):
        dataset_builder.demonstrations(recipe(demonstrations=bad), plain)
