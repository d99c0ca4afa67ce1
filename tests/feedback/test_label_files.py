# SPDX-License-Identifier: Apache-2.0
"""Task files in, label files out, and that recipes, `evaluate` and `judge` read them."""

import json
from collections import Counter

import pytest

from lora_rlhf.data import row_formats, sources
from lora_rlhf.errors import DataError, UsageError
from lora_rlhf.evaluation import judge_validation
from lora_rlhf.evaluation.judges import Pairs, People
from lora_rlhf.feedback import label_files
from lora_rlhf.feedback.labels import Label
from lora_rlhf.recipe.schema import DataSource

THREE = {"sft": "Red.", "policy": "Blue.", "base": "Colour?"}
TO_LABEL = {"set": "quick", "id": "7", "why": "the judges disagree", "prompt": "Name a colour.",
            "answers": THREE, "ranking": None}  # fmt: skip
TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(tmp_path, *rows, kind="ranking"):
    return label_files.read_tasks(write(tmp_path / "tasks.jsonl", *rows), kind)


def label(task, value, labeler="anna", **fields):
    number = fields.pop("id", 1)
    given = {"flags": (), "both_bad": False, "note": "", "order": (), "seconds": 1.0}
    given |= {"guidelines": "", "created": ""} | fields
    return Label(number, task.id, labeler, value, **given)


def exported(tmp_path, tasks, labels, form=None, **options):
    path = tmp_path / "out.jsonl"
    sentence = label_files.export(tasks, labels, path, form, **options)
    return [json.loads(line) for line in path.read_text().splitlines()], sentence


# -------------------------------------------------------------------------------- tasks


def test_what_an_evaluation_writes_is_a_task_file(tmp_path):
    [task] = read(tmp_path, TO_LABEL)
    assert (task.id, task.set, task.type, task.why) == (
        "quick/7",
        "quick",
        "ranking",
        TO_LABEL["why"],
    )
    assert {one.model: one.text for one in task.answers} == THREE
    assert task.prompt == ({"role": "user", "content": "Name a colour."},)


def test_types_follow_the_answers_and_ids_the_content(tmp_path):
    rows = [
        {"prompt": "a"},
        {"prompt": "a", "checks": {"max_words": 3}},
        {"prompt": TURNS, "answers": {"m": "x"}, "gold": {"overall": 3}},
        {"prompt": "a", "answers": {"m": "x", "n": "y"}, "kind": "chat", "round": 2},
        {"prompt": "a", "answers": THREE, "id": 4},
        {"prompt": "a", "answers": {"m": "x", "n": "y"}, "type": "ranking"},
    ]
    tasks = read(tmp_path, *rows, rows[4], kind="pair")
    kinds = ["demonstration", "demonstration", "rating", "pair", "ranking", "ranking"]
    assert [task.type for task in tasks] == kinds
    assert tasks[2].prompt == tuple(TURNS) and tasks[2].gold["overall"] == 3
    assert (tasks[3].kind, tasks[3].round, tasks[4].id) == ("chat", 2, "4")
    assert len({task.id for task in tasks}) == 6


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"anwsers": {}}, "unknown field 'anwsers'; known: id, set"),
        ({"prompt": ""}, "does not end with a text of the user"),
        ({"prompt": [{"role": "assistant", "content": "a"}]}, "does not end with a text"),
        ({"prompt": [{"role": "bot", "content": "a"}]}, "role 'bot'"),
        ({"prompt": [{"role": "user"}]}, "expected role and content"),
        ({"prompt": None}, "prompt None"),
        ({"prompt": "cut \ud83d"}, "half of a character (U+D83D) after"),
        ({"answers": ["a", "b"]}, "expected model names with texts"),
        ({"answers": dict.fromkeys("abcdefghij", "x")}, "10 answers: a ranking has 2 to 9"),
        ({"type": "pair"}, "3 answers: a pair has 2"),
        ({"type": "poll"}, "type 'poll'"),
        ({"gold": {"ranks": [1]}}, "expected 3 of them"),
        ({"checks": {"words": 3}}, "unknown key 'words'"),
        ({"id": ""}, "id ''"),
        ({"round": "x"}, "round 'x'"),
        ({"why": 3}, "kind, why and set: expected texts"),
        ({"ranking": [["sft"]]}, "it has a ranking already"),
        ({"prompt": "Another."}, "the id 'quick/7' is also that of"),
    ],
)
def test_a_row_that_is_no_task_is_named(tmp_path, change, problem):
    with pytest.raises(DataError) as error:
        read(tmp_path, TO_LABEL, TO_LABEL | change)
    assert problem in error.value.given and error.value.where.endswith("tasks.jsonl:2")


# ------------------------------------------------------------------------------- labels


@pytest.fixture
def tasks(tmp_path):
    return read(
        tmp_path,
        TO_LABEL,
        {"id": "p", "type": "pair", "prompt": "Two?", "answers": {"a": "one", "b": "two"}},
        {
            "id": "d",
            "prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}],
        },
        {"id": "e", "prompt": "Write."},
        {"id": "r1", "prompt": "Rate", "answers": {"a": "bad"}},
        {"id": "r2", "prompt": "Rate", "answers": {"b": "good"}},
        {"id": "g", "prompt": "Gold?", "answers": THREE, "gold": {"ranks": [1, 2, 3]}},
    )


def parsed(rows, name, chat=True):
    placed = [(f"out.jsonl:{n}", row) for n, row in enumerate(rows, 1)]
    source = DataSource(path="out.jsonl")
    return row_formats.examples(placed, name, chat, Counter(), sources.Skips(), source)


def test_comparisons_are_read_by_a_recipe(tmp_path, tasks):
    ranking, pair, _, _, worse, better, gold = tasks
    labels = [
        label(ranking, {"ranks": [2, 1, 2]}),
        label(ranking, {"ranks": [1, 1, 1]}, "bob"),
        label(pair, {"strength": -2}),
        label(worse, {"overall": 2, "questions": {}}),
        label(better, {"overall": 6, "questions": {}}),
        label(gold, {"ranks": [1, 2, 3]}),
        label(pair, None, "bob"),
    ]
    rows, sentence = exported(tmp_path, tasks, labels)
    assert "3 rows (comparisons) from 4 labels; left out: 1 of gold items, 1 skipped" in sentence
    assert sentence.endswith(", 1 with all answers tied")
    examples = parsed(rows, "comparisons")
    assert [one.ranks for one in examples] == [[2, 1, 2], [1, 2], [2, 1]]
    assert examples[0].prompt == [{"role": "user", "content": "Name a colour."}]
    assert [one.ranks for one in parsed(rows, "comparisons", chat=False)] == [
        one.ranks for one in examples
    ]


def test_demonstrations_are_read_by_a_recipe(tmp_path, tasks):
    labels = [label(tasks[3], {"text": "Words."}), label(tasks[3], {"text": "More."}, "bob")]
    rows, sentence = exported(tmp_path, tasks, labels)
    assert "2 rows (demonstrations)" in sentence
    assert [one.answers for one in parsed(rows, "demonstrations", chat=False)] == [
        ["Words."],
        ["More."],
    ]
    rows, _ = exported(tmp_path, tasks, [label(tasks[2], {"text": "A."})])
    [example] = parsed(rows, "demonstrations")
    assert [turn["role"] for turn in example.prompt] == ["system", "user"]
    assert example.answers == [[{"role": "assistant", "content": "A."}]]


def test_rankings_are_read_by_evaluate(tmp_path, tasks):
    labels = [label(tasks[0], {"ranks": [3, 1, 1]}), label(tasks[1], {"strength": 3})]
    rows, sentence = exported(tmp_path, tasks, labels, "rankings")
    assert "left out: 1 of no evaluation (the task has no set)" in sentence
    assert rows == [
        {"set": "quick", "id": "7", "ranking": [["policy", "base"], ["sft"]],
         "why": "the judges disagree", "labeler": "anna"}
    ]  # fmt: skip
    people = People("people", tmp_path / "out.jsonl")
    people.check({"quick": {"7"}}, ["sft", "policy"], "sft")
    row = [judge_validation.Row("7", "", "Name a colour.")]
    pairs = Pairs(row, ["Blue."], ["Red."], "quick", ("policy", "sft"))
    verdicts = people.compare(pairs)
    assert verdicts.wins == [1.0] and verdicts.at_random == [False]


def test_pairs_are_read_by_judge(tmp_path, tasks):
    labels = [
        label(tasks[0], {"ranks": [1, 2, 2]}),
        label(tasks[0], {"ranks": [2, 1, 3]}, "bob"),
        label(tasks[1], {"strength": 1}),
    ]
    rows, _ = exported(tmp_path, tasks, labels, "judge")
    assert [row["labels"] for row in rows] == [["a", "b"], ["a", "a"], ["tie", "a"], ["b"]]
    pairs, _ = judge_validation.read(tmp_path / "out.jsonl")
    assert len(pairs) == 4
    assert {frozenset((one.first, one.second)) for one in pairs} >= {frozenset(("one", "two"))}


def test_what_is_broken_private_or_by_a_left_out_labeler_is_not_written(tmp_path, tasks):
    labels = [
        label(tasks[0], {"ranks": [1, 2, 3]}),
        label(tasks[0], {"ranks": [1, 2, 3]}, "bob", flags=("personal_data",)),
        label(tasks[1], {"strength": 1}, "carl"),
        label(tasks[1], {"strength": 1}, "dan", flags=("harmful",)),
    ]
    rows, sentence = exported(tmp_path, tasks, labels, without=["carl"])
    assert [row["labeler"] for row in rows] == ["dan"]
    assert "2 flagged as broken or personal data, 1 by labelers left out" in sentence
    with pytest.raises(DataError, match=r"no label can be written as demonstrations; left out"):
        exported(tmp_path, tasks, labels, "demonstrations")
    with pytest.raises(DataError, match="no label can be written as comparisons"):
        exported(tmp_path, tasks, [])
    with pytest.raises(UsageError, match="no label by 'eve'"):
        exported(tmp_path, tasks, labels, without=["eve"])
    with pytest.raises(UsageError, match="no form 'csv'"):
        exported(tmp_path, tasks, labels, "csv")
    with pytest.raises(DataError, match="label 9 is of the task 'quick/7', which is not in"):
        exported(tmp_path, tasks[1:], [label(tasks[0], {"ranks": [1, 2, 3]}, id=9)])
