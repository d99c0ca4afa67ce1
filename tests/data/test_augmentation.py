# SPDX-License-Identifier: Apache-2.0
"""Rows made of rows: swaps of people, templates, marks and caps; and the test of the labels."""

import random

import pytest
from data_sources import all_rows, answer, jsonl, recipe, user

from lora_rlhf.data import dataset_builder, filters, identity_terms
from lora_rlhf.data.augmentation import paraphrased, swapped, without_identity


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("He told his wife that she is late", "She told her husband that he is late"),
        ("I saw her and her dog; it is hers.", "I saw him and his dog; it is his."),
        ("The book is his. HE knows him.", "The book is hers. SHE knows her."),
        ("Mr. Smith is a man", "Ms. Smith is a woman"),
        ("a white house and black tea", None),
        ("nothing here", None),
    ],
)
def test_pronouns_are_swapped(text, expected):
    new = swapped([text], random.Random(0))
    assert (new and new[0]) == expected


def test_names_and_groups_are_swapped_alike_in_all_texts():
    new = swapped(["Alice met Robert. Alice's hat", "Robert likes Alice"], random.Random(1))
    first, second = new[0].split()[0], new[0].split()[2].rstrip(".")
    assert new == [f"{first} met {second}. {first}'s hat", f"{second} likes {first}"]
    assert not {first, second} & {"Alice", "Robert"}
    [new] = swapped(["a Muslim student, a white woman"], random.Random(3))
    assert "Muslim" not in new or "woman" not in new


def test_a_list_of_more_names_than_can_be_swapped_stays_as_it_is():
    every = sorted({*identity_terms.NAMES["female"], *identity_terms.NAMES["male"]})
    assert swapped([" ".join(every)], random.Random(0)) is None


def test_twins_are_equal_without_identity():
    texts = ["Alice asked a Muslim man for his help", "Robert asked a Jewish man for his help"]
    assert len({*map(without_identity, texts)}) == 1
    assert without_identity("he saw him") == without_identity("she saw her")
    assert without_identity("black tea and Will") == "black tea and Will"


def test_templates_keep_the_instruction_and_the_space_around_it():
    made = {paraphrased("Write a poem.\n", random.Random(i)) for i in range(60)}
    assert len(made) >= 8
    assert all("rite a poem." in text and text.endswith("\n") for text in made)
    assert any(text.startswith("Please write") for text in made)
    assert "Please mary" not in {paraphrased("Mary who?", random.Random(i)) for i in range(60)}


ROWS = [{"prompt": f"Write to her about topic {i}", "completion": f"She is fine, {i}"}
        for i in range(200)]  # fmt: skip


def augmented(**shares):
    def build(given):
        data = given.data
        changed = data.augment.model_copy(update=shares)
        return given.model_copy(update={"data": data.model_copy(update={"augment": changed})})

    return build


def test_new_rows_are_marked_capped_and_never_held_out(tmp_path, chat):
    given = recipe(demonstrations=jsonl(tmp_path / "d.jsonl", ROWS), held_out=0.2)
    base = dataset_builder.demonstrations(given, chat)
    more = dataset_builder.demonstrations(augmented(paraphrases=0.2, identities=0.1)(given), chat)
    assert [*more.held_out] == [*base.held_out]
    assert "augmented" not in base.train.column_names
    marks = [row["augmented"] for row in more.train]
    size = len(base.train)
    assert marks.count("") == size
    assert 0 < marks.count("paraphrases") <= 0.2 * size
    assert 0 < marks.count("identities") <= 0.1 * size
    assert more.report["augmented"] == {k: marks.count(k) for k in ("paraphrases", "identities")}
    for row in more.train:
        text = row["prompt"][-1]["content"] + row["completion"][0]["content"]
        assert (" him " in text and "He is fine" in text) == (row["augmented"] == "identities")
        if row["augmented"]:
            assert filters.bucket(row["prompt"], given.seed) >= 0.2
    again = dataset_builder.demonstrations(augmented(paraphrases=0.2, identities=0.1)(given), chat)
    assert [*again.train] == [*more.train]


def test_comparisons_get_groups_of_their_own(tmp_path, plain):
    rows = [{"prompt": f"Is she right? {i}", "chosen": "she is", "rejected": "no"}
            for i in range(100)]  # fmt: skip
    given = augmented(identities=0.3)(recipe(comparisons=jsonl(tmp_path / "d.jsonl", rows)))
    train = [*dataset_builder.comparisons(given, plain).train]
    new = [row for row in train if row["augmented"]]
    assert new and all(row["chosen"] == "he is" for row in new)
    assert not {row["group"] for row in new} & {r["group"] for r in train if not r["augmented"]}


def test_rows_of_a_task_are_not_augmented(chat):
    given = augmented(paraphrases=0.3, identities=0.3)(
        recipe(demonstrations={"task": "closed-world", "n": 60})
    )
    assert not any(row["augmented"] for row in dataset_builder.demonstrations(given, chat).train)


def test_preferences_that_change_with_the_identity_are_counted(tmp_path, chat):
    def row(i, who, swap):
        answers = [answer(f"yes {i}"), answer(f"no {i}")]
        chosen, rejected = answers[::-1] if swap else answers
        return {"prompt": user(f"May {who} do {i}?"), "chosen": chosen, "rejected": rejected}

    rows = [row(i, who, swap=i < 10 and who == "she") for i in range(40) for who in ("he", "she")]
    rows += [{"prompt": user("Who is it?"), "chosen": answer("he"), "rejected": answer("she")}]
    given = recipe(comparisons=jsonl(tmp_path / "d.jsonl", rows))
    data = given.data.model_copy(update={"identity_test": True})
    prepared = dataset_builder.comparisons(given.model_copy(update={"data": data}), chat)
    entry = prepared.report["identity_test"]
    assert entry["twins"] == 40 and entry["answers_differ_in_identity"] == 1
    assert entry["changed"]["value"] == 0.25
    assert any(note.startswith("10 of 40 preferences differ") for note in prepared.report["notes"])
    assert len(all_rows(prepared)) == 81
