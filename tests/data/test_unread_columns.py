# SPDX-License-Identifier: Apache-2.0
"""Columns that are not read, and that would be missed, stop the run with the mapping to write."""

import pytest
from data_sources import PAIRS, PREFS, all_rows, answer, jsonl, make_tokenizer, recipe, user

from lora_rlhf.data import dataset_builder
from lora_rlhf.errors import DataError


def prepare(tmp_path, tokenizer, rows, name="demonstrations", **source):
    path = str(jsonl(tmp_path / "d.jsonl", rows))
    return getattr(dataset_builder, name)(recipe(**{name: {"path": path, **source}}), tokenizer)


def with_column(name, values, rows=PAIRS):
    return [{**row, name: values[i % len(values)]} for i, row in enumerate(rows)]


ALPACA = [{"instruction": "Rewrite.", "input": f"Bus {i}", "output": f"b{i}"} for i in range(40)]


def test_alpacas_input_is_a_part_of_the_prompt(tmp_path, plain):
    with pytest.raises(DataError, match="no usable columns") as caught:
        prepare(tmp_path, plain, ALPACA)
    mapping = "columns: {prompt: instruction, completion: output, input: input}"
    assert mapping in caught.value.remedy
    columns = {"prompt": "instruction", "completion": "output"}
    rows = all_rows(prepare(tmp_path, plain, ALPACA, columns=columns))
    assert {row["prompt"] for row in rows} == {f"Rewrite.\n\nBus {i}" for i in range(40)}
    asked = prepare(tmp_path, plain, ALPACA, "prompts", columns={"prompt": "instruction"})
    assert {row["prompt"] for row in all_rows(asked)} == {row["prompt"] for row in rows}


@pytest.mark.parametrize("templated", [True, False])
def test_a_system_column_goes_before_the_prompt(tmp_path, templated):
    tokenizer = make_tokenizer() if templated else make_tokenizer(None)
    rows = all_rows(prepare(tmp_path, tokenizer, with_column("system", ["Be brief."])))
    for row in rows:
        prompt = row["prompt"]
        if templated:
            assert prompt[0] == {"role": "system", "content": "Be brief."} and len(prompt) == 2
        else:
            assert prompt.startswith("Be brief.\n\nq")
    if templated:
        talks = [{"conversations": user(f"q{i}") + answer("a"), "system": "Be."} for i in range(40)]
        assert prepare(tmp_path, tokenizer, talks).train[0]["prompt"][0]["content"] == "Be."


@pytest.mark.parametrize(
    ("rows", "column", "advice"),
    [
        (with_column("context", ["Oslo", "Rome"]), "context", "columns: {input: context}"),
        (with_column("system_prompt", ["Be"]), "system_prompt", "columns: {system: system_prompt}"),
        (with_column("functions", [[{"name": "f"}]]), "functions", "write what it says"),
        (with_column("question", ["why"]), "question", "columns: {input: question}"),
        ([{"question": r["prompt"], "chosen": f"so {r['chosen']}", "rejected": f"so {i}"}
          for i, r in enumerate(PREFS)], "question", "columns: {prompt: question}"),
        ([{"frage": r["prompt"], "chosen": "x", "rejected": "y"} for r in PREFS], "frage",
         "columns: {prompt: frage}"),
    ],
)  # fmt: skip
def test_a_column_that_looks_needed_stops(tmp_path, plain, rows, column, advice):
    with pytest.raises(DataError, match=f"'{column}' is not read, and looks like a part") as caught:
        prepare(tmp_path, plain, rows)
    assert advice in caught.value.remedy and f"ignore: [{column}]" in caught.value.remedy
    if "completion" in rows[0]:
        assert len(all_rows(prepare(tmp_path, plain, rows, ignore=[column]))) == 60


def test_a_column_whose_text_is_in_the_prompt_is_not_missed(tmp_path, plain):
    rows = [{**row, "question": row["prompt"], "id": i} for i, row in enumerate(PAIRS)]
    prepared = prepare(tmp_path, plain, rows)
    assert len(all_rows(prepared)) == 60 and "not read: question, id" in prepared.lines[0]


def test_thumbs_are_used_or_left_out_on_purpose(tmp_path, plain):
    rows = with_column("label", [True, False])
    with pytest.raises(DataError, match="judges the answers .True: 30, False: 30.") as caught:
        prepare(tmp_path, plain, rows)
    assert "columns: {label: label}" in caught.value.remedy
    kept = prepare(tmp_path, plain, rows, columns={"label": "label"})
    assert {int(row["prompt"][1:]) % 2 for row in all_rows(kept)} == {0}
    assert kept.report["counts"]["label is false"] == {"before": 60, "after": 30}
    assert len(all_rows(prepare(tmp_path, plain, rows, ignore=["label"]))) == 60
    rows = with_column("label", [True, "maybe"])
    with pytest.raises(DataError, match="'label' must be true or false: maybe"):
        prepare(tmp_path, plain, rows, columns={"label": "label"})


def test_an_ignored_column_is_not_read(tmp_path, plain):
    rows = with_column("input", ["more"])
    assert prepare(tmp_path, plain, rows).train[0]["prompt"].endswith("\n\nmore")
    row = prepare(tmp_path, plain, rows, ignore=["input"]).train[0]
    assert "more" not in row["prompt"]


def test_a_label_cannot_judge_pairs(tmp_path, plain):
    rows = with_column("label", [True, False], PREFS)
    with pytest.raises(DataError, match="judges the answers") as caught:
        prepare(tmp_path, plain, rows, "comparisons", columns={"label": "label"})
    assert "columns: {" not in caught.value.remedy


def test_annotators_may_be_people_or_judgements(tmp_path, plain):
    people = with_column("annotator", ["ann", "bo"], PREFS)
    assert len(all_rows(prepare(tmp_path, plain, people, "comparisons"))) == 60
    with pytest.raises(DataError, match="'annotator1' is not read, and judges .* .1: 30, 2: 30"):
        prepare(tmp_path, plain, with_column("annotator1", [1, 2], PREFS), "comparisons")


def test_an_answer_by_the_user_is_no_answer(tmp_path, chat):
    rows = [*PAIRS, {"prompt": "q", "completion": user("a")}]
    assert "left out: 1 answers of another role" in prepare(tmp_path, chat, rows).lines[0]


@pytest.mark.parametrize("column", ["rating", "qualityScore", "is_correct", "upvotes", "kto_tag",
                                    "desirable", "sample_weight"])  # fmt: skip
def test_a_column_that_judges_the_answers_stops(tmp_path, plain, column):
    with pytest.raises(DataError, match=f"'{column}' is not read, and judges"):
        prepare(tmp_path, plain, with_column(column, [1, 5]))
    assert len(all_rows(prepare(tmp_path, plain, with_column(column, [5])))) == 60  # all the same
    assert len(prepare(tmp_path, plain, with_column(column, [1, 5]), "prompts").train) > 40


@pytest.mark.parametrize(("column", "values", "what"), [
    ("status", ["approved", "rejected"], "judges the answers"),
    ("note", ["👍", "👎", "👍"], "judges the answers"),
    ("subset", ["train", "train", "test"], "keeps rows out of training"),
])  # fmt: skip
def test_a_column_whose_values_tell_answers_apart_stops(tmp_path, plain, column, values, what):
    with pytest.raises(DataError, match=f"'{column}' is not read, and {what}"):
        prepare(tmp_path, plain, with_column(column, values))
    assert len(all_rows(prepare(tmp_path, plain, with_column(column, values[:1])))) == 60
    other = with_column(column, ["train", "bus"])  # other words say nothing about the answers
    assert len(all_rows(prepare(tmp_path, plain, other))) == 60


def test_choices_that_the_prompt_holds_are_not_missed(tmp_path, plain):
    rows = [
        {"prompt": f"{i} is A or B?", "completion": "A", "choices": ["A", "B"]} for i in range(40)
    ]
    assert len(all_rows(prepare(tmp_path, plain, rows))) == 40
    rows = [{**row, "prompt": f"q{i}"} for i, row in enumerate(rows)]
    with pytest.raises(DataError, match="'choices' is not read"):
        prepare(tmp_path, plain, rows)


def test_scores_of_a_pair_must_not_prefer_the_rejected_answer(tmp_path, plain):
    rows = [{**row, "score_chosen": 5.0, "score_rejected": 2.0} for row in PREFS]
    assert len(all_rows(prepare(tmp_path, plain, rows, "comparisons"))) == 60
    rows[7]["score_rejected"] = 6.0
    with pytest.raises(DataError, match="1 of 60 rows have a score_chosen below") as caught:
        prepare(tmp_path, plain, rows, "comparisons")
    assert caught.value.where.endswith("d.jsonl:8")


@pytest.mark.parametrize(
    "extra",
    [
        {"function_call": {"name": "f"}},
        {"reasoning_content": "hm"},
        {"weight": 0},
        {"loss": False},
        {"mask": 1},
    ],
)
def test_keys_of_a_turn_that_no_stage_reads_are_refused(tmp_path, chat, extra):
    rows = [{"messages": [*user("q"), {**answer("a")[0], **extra}]}]
    with pytest.raises(DataError, match=f"a turn has '{next(iter(extra))}', which no stage reads"):
        prepare(tmp_path, chat, rows)


def test_advice_that_no_mapping_can_follow_is_not_given(tmp_path, plain):
    rows = [{"info": {"post": "q"}, "summaries": {"text": "a"}, "choice": 1}] * 3
    with pytest.raises(DataError, match="no usable columns") as caught:
        prepare(tmp_path, plain, rows, "comparisons")
    assert "`columns:` cannot make them" in caught.value.remedy


@pytest.mark.parametrize(("column", "values", "way_out"), [
    ("is_test", [True, False], "`ignore: [is_test]`"), ("train", [0, 1], "for data.evaluate"),
    ("finish_reason", ["stop", "length"], "columns: {label: finish_reason}"),
    ("truncated", [True, False], "leave in the file"), ("toxic", [True, False], "leave in the"),
    ("flagged", [True], "leave in the file"),
    ("error", ["timeout", None], "leave in the file"),
    ("metadata", [{"rating": 1}, {"rating": 5}], "`ignore: [metadata.rating]`"),
    ("extra_info", [{"split": "test"}, {"split": "train"}], "`ignore: [extra_info.split]`"),
])  # fmt: skip
def test_rows_that_are_not_to_be_trained_on_are_told_apart(
    tmp_path, plain, column, values, way_out
):
    rows = with_column(column, values)
    with pytest.raises(DataError, match=f"the column '{column}") as caught:
        prepare(tmp_path, plain, rows)
    assert way_out in caught.value.remedy
    assert ("label" in caught.value.remedy) == (column == "finish_reason")  # true is no praise
    ignored = caught.value.remedy.rpartition("`ignore: [")[2].partition("]")[0]
    assert len(all_rows(prepare(tmp_path, plain, rows, ignore=[ignored]))) == len(rows)


@pytest.mark.parametrize(("column", "values"), [
    ("skip_prompt_formatting", [None, False]),  # of OpenHermes
    ("error_code", [*range(400, 460)]), ("error_message", [f"line {i}" for i in range(60)]),
    ("valid_until", ["2026-01-31", "2026-02-28"]), ("include_toc", [True, False]),
    ("excluded_words", [["a"], ["b"]]), ("n_train", [0, 1]), ("keep_alive", [30, 60]),
    ("toxic", [False]), ("truncated", [False]), ("helpful", [True]),  # no row is judged as bad
])  # fmt: skip
def test_columns_about_something_else_are_only_named(tmp_path, plain, column, values):
    rows = with_column(column, values)
    assert f"not read: {column}" in prepare(tmp_path, plain, rows).lines[0]


def test_a_judgement_on_the_last_turn_stops(tmp_path, chat):
    rows = [{"messages": [*user(f"q{i}"), {**answer("a")[0], "rating": i % 2, "id": i}]}
            for i in range(40)]  # fmt: skip
    with pytest.raises(DataError, match="the column 'messages.rating' is not read, and judges"):
        prepare(tmp_path, chat, rows)
    assert len(all_rows(prepare(tmp_path, chat, rows, ignore=["messages.rating"]))) == 40


@pytest.mark.parametrize(("row", "remedy"), [
    ({"prompt": "q", "response_a": "a", "response_b": "b", "winner": "a"}, "cannot choose"),
    ({"question": "q", "answer_0": "a", "answer_1": "b", "score_0": 1}, "'answer_0' and "),
    ({"messages": [], "rejected_response": "b"}, "'rejected_response' as `rejected`"),
    ({"instruction": "q", "output": ["a", "b"]}, "'output' is a list of texts"),
    ({"text": "### Human: q ### Assistant: a"}, "split each text"),
])  # fmt: skip
def test_known_forms_of_pairs_say_how_they_are_written(tmp_path, plain, row, remedy):
    with pytest.raises(DataError, match="no usable columns") as caught:
        prepare(tmp_path, plain, [row] * 3, "comparisons")
    assert remedy in caught.value.remedy and "our name" not in caught.value.remedy


@pytest.mark.parametrize(("completion", "remedy"), [
    (["a"], "write all rows in this form"), (3, "write all rows in this form"),
])  # fmt: skip
def test_if_every_row_is_broken_none_is_to_be_skipped(tmp_path, chat, completion, remedy):
    rows = [{"prompt": f"q{i}", "completion": completion} for i in range(9)]
    with pytest.raises(DataError, match="9 of 9 rows do not fit") as caught:
        prepare(tmp_path, chat, rows)
    assert caught.value.remedy == remedy


@pytest.mark.parametrize(("max_lost", "stops"), [(0.2, True), (0.6, False)])
def test_any_filter_above_max_lost_stops(tmp_path, max_lost, stops):
    guard = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    turns = "{% for m in messages %}{{ m.content }}{% endfor %}"
    rows = [{**row, **({"system": "Be."} if i % 2 else {})} for i, row in enumerate(PAIRS)]
    path = jsonl(tmp_path / "d.jsonl", rows)
    given = recipe(demonstrations=path, max_lost=max_lost, held_out=0.3)
    tokenizer = make_tokenizer(guard + turns)
    if not stops:
        assert len(all_rows(dataset_builder.demonstrations(given, tokenizer))) == 30
        return
    with pytest.raises(DataError, match="50% of the demonstrations are dropped as: refused by the"):
        dataset_builder.demonstrations(given, tokenizer)
    with pytest.raises(DataError, match="the chat template refuses: no system"):
        dataset_builder.demonstrations(given, tokenizer)


def test_a_run_is_told_what_a_set_was_taken_for(tmp_path, chat):
    first, *more = prepare(tmp_path, chat, [*PAIRS, PAIRS[0]]).lines
    assert first.startswith("demonstrations: prompt + completion; 61 rows read, ")
    assert first.endswith("held out; left out: 1 duplicate")
    assert more[0].strip().startswith("plain text was wrapped into one user and one assistant")
    assert "<|im_start|>assistant\\n" in more[-1] and more[-1].endswith("<|im_end|>")
