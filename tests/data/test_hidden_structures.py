# SPDX-License-Identifier: Apache-2.0
"""Structures hidden in texts are read or refused; impossible values are refused."""

import json

import pytest
from data_sources import PAIRS, all_rows, answer, jsonl, recipe, user

from lora_rlhf.data import dataset_builder
from lora_rlhf.errors import DataError

N = 30


def demonstrations(tmp_path, tokenizer, rows, **source):
    path = str(jsonl(tmp_path / "d.jsonl", rows))
    given = recipe(demonstrations={"path": path, **source})
    return dataset_builder.demonstrations(given, tokenizer)


def comparisons(tmp_path, tokenizer, rows, **source):
    path = str(jsonl(tmp_path / "c.jsonl", rows))
    return dataset_builder.comparisons(recipe(comparisons={"path": path, **source}), tokenizer)


def test_a_prompt_that_the_answers_repeat_is_taken_off_them(tmp_path, plain, chat):
    rows = [{"prompt": f"Is {i} odd?", "chosen": f"Is {i} odd? No.", "rejected": f"Is {i} odd? So"}
            for i in range(N)]  # fmt: skip
    for tokenizer, made in ((plain, str), (chat, answer)):
        prepared = comparisons(tmp_path, tokenizer, rows)
        [pair] = {json.dumps([r["chosen"], r["rejected"]]) for r in all_rows(prepared)}
        texts = (" No.", " So") if made is str else ("No.", "So")
        assert json.loads(pair) == [made(text) for text in texts]
        note = f"answers began with their prompt, which was removed ({N} rows)"
        assert note in prepared.report["notes"]
    rows = [{"prompt": user(f"q{i}"), "completion": user(f"q{i}") + answer("a")} for i in range(N)]
    for row in all_rows(demonstrations(tmp_path, chat, rows)):
        assert [turn["role"] for turn in row["prompt"]] == ["user"]


def test_a_few_answers_that_begin_with_their_prompt_stay_as_they_are(tmp_path, plain):
    rows = [*PAIRS, {"prompt": "The", "completion": "The cat."}]
    assert "The cat." in {r["completion"] for r in all_rows(demonstrations(tmp_path, plain, rows))}


def test_transcripts_with_line_breaks_of_windows_are_transcripts(tmp_path, chat):
    heads = [f"\r\n\r\nHuman: q{i}\r\n\r\nAssistant: hm?\r\n\r\nHuman: more\r\n\r\nAssistant:"
             for i in range(N)]  # fmt: skip
    rows = [{"chosen": f"{head} good", "rejected": f"{head} bad"} for head in heads]
    row = comparisons(tmp_path, chat, rows).train[0]
    assert [turn["role"] for turn in row["prompt"]] == ["user", "assistant", "user"]
    assert (row["chosen"], row["rejected"]) == (answer("good"), answer("bad"))


@pytest.mark.parametrize("write", [json.dumps, str])
def test_lists_written_as_text_are_read(tmp_path, chat, write):
    turns = [{"messages": write(user(f"q{i}") + answer("a"))} for i in range(N)]
    prepared = demonstrations(tmp_path, chat, turns)
    assert {row["completion"][0]["content"] for row in all_rows(prepared)} == {"a"}
    assert f"lists written as text were read as lists ({N} rows)" in prepared.report["notes"]
    ranked = [{"prompt": f"q{i}", "completions": write(["x", "y"]), "ranks": write([2, 1])}
              for i in range(N)]  # fmt: skip
    assert comparisons(tmp_path, chat, ranked).train[0]["chosen"] == answer("y")


def test_a_list_of_messages_that_cannot_be_read_is_no_text(tmp_path, chat):
    text = "[{'role': 'user', 'content': 'q'}\n {'role': 'assistant', 'content': 'a'}]"
    rows = [{"prompt": text, "completion": "a"} for _ in range(N)]
    with pytest.raises(DataError, match="holds messages as invalid JSON"):
        demonstrations(tmp_path, chat, rows)


@pytest.mark.parametrize("text", ["<|im_start|>user\nq{}<|im_end|>\n<|im_start|>assistant\n",
                                  "<s>[INST] q{} [/INST]", "USER: q{}\nASSISTANT:",
                                  "### Instruction:\nq{}\n\n### Response:\n"])  # fmt: skip
def test_a_conversation_rendered_as_one_text_is_refused(tmp_path, chat, plain, text):
    rows = [{"prompt": text.format(i), "completion": "a"} for i in range(N)]
    with pytest.raises(DataError, match="conversations written as one text"):
        demonstrations(tmp_path, chat, rows)
    if "<|" not in text:  # without a template, the text is what the model is given
        assert len(all_rows(demonstrations(tmp_path, plain, rows))) == N


@pytest.mark.parametrize("templated", [True, False])
def test_an_end_of_turn_that_most_answers_hold_as_text_is_taken_off(
    tmp_path, chat, plain, templated
):
    rows = [{"prompt": f"q{i}", "completion": f"a{i}<|eot_id|>\n"} for i in range(N)]
    rows.append({"prompt": "how do turns end?", "completion": "With </s>"})
    prepared = demonstrations(tmp_path, chat if templated else plain, rows)
    for row in all_rows(prepared):
        text = row["completion"][0]["content"] if templated else row["completion"]
        assert (
            text == f"a{row['prompt'][0]['content'][1:] if templated else row['prompt'][1:]}"
            or (text == "With </s>")
        )
    note = f"answers ended with <|eot_id|>, which was removed ({N} rows)"
    assert note in prepared.report["notes"]


@pytest.mark.parametrize("delimiter", [";", "|", "\t"])
def test_a_csv_may_part_its_columns_otherwise(tmp_path, plain, delimiter):
    lines = [delimiter.join(("prompt", "completion"))]
    lines += [f"q{i}{delimiter}1,50 Euro" for i in range(N)]
    (tmp_path / "d.csv").write_text("\r\n".join(lines), encoding="utf-8-sig")
    given = recipe(demonstrations=tmp_path / "d.csv")
    rows = all_rows(dataset_builder.demonstrations(given, plain))
    assert {row["completion"] for row in rows} == {"1,50 Euro"}


# --- impossible values ------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [[9.0, 1.0, 6.5], [0, 1, 2], [1, 2, 4], [2, 3, 3], [-1, 1, 2]])
def test_what_cannot_be_ranks_is_refused_with_both_readings(tmp_path, plain, ranks):
    rows = [{"prompt": f"q{i}", "completions": ["a", "b", "c"], "ranks": ranks} for i in range(N)]
    with pytest.raises(DataError, match="1 .the best. to 3; if they are scores") as caught:
        comparisons(tmp_path, plain, rows)
    assert "map them to `scores`" in caught.value.given


@pytest.mark.parametrize("ranks", [[1, 1, 3], [1, 1, 2], [1.5, 1.5, 3], [2, 2, 3], [1, 3, 3]])
def test_equal_ranks_may_be_counted_in_any_way(tmp_path, plain, ranks):
    rows = [{"prompt": f"q{i}", "completions": ["a", "b", "c"], "ranks": ranks} for i in range(N)]
    pairs = {(r["chosen"], r["rejected"]) for r in all_rows(comparisons(tmp_path, plain, rows))}
    assert ("a", "c") in pairs and ("c", "a") not in pairs


def test_of_scores_the_highest_is_the_best(tmp_path, plain):
    rows = [{"q": f"q{i}", "answers": ["bad", "good"], "scores": [1.0, 9.5]} for i in range(N)]
    columns = {"prompt": "q", "completions": "answers"}
    row = comparisons(tmp_path, plain, rows, columns=columns).train[0]
    assert (row["chosen"], row["rejected"]) == ("good", "bad")
    row = demonstrations(tmp_path, plain, rows, columns=columns).train[0]
    assert row["completion"] == "good"
    rows = [{**row, "scores": [1, 2]} for row in rows]  # possible ranks, under a telling name
    with pytest.raises(DataError, match="'scores' is read as ranks, of which 1 is the best"):
        comparisons(tmp_path, plain, rows, columns={**columns, "ranks": "scores"})


def test_a_negative_margin_prefers_the_rejected_answer(tmp_path, plain):
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b", "margin": -1}]
    with pytest.raises(DataError, match="column 'margin' is -1"):
        comparisons(tmp_path, plain, rows)
