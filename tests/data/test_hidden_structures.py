# SPDX-License-Identifier: Apache-2.0
"""Structures hidden in texts are read or refused; impossible values are refused."""

import json

import pytest
from data_sources import PAIRS, all_rows, answer, jsonl, make_tokenizer, recipe, user
from tokenizers import normalizers

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
                                  "### Instruction:\nq{}\n\n### Response:\n",
                                  "Below is a task.\n\n### Instruction:\nq{}\n\n### Response:",
                                  "A chat with an assistant. USER: q{} ASSISTANT:",
                                  "### Human: q{}### Assistant: yes{}"])  # fmt: skip
def test_a_conversation_rendered_as_one_text_is_refused(tmp_path, chat, plain, text):
    rows = [{"prompt": text.format(i, i), "completion": "a"} for i in range(2 * N)]
    with pytest.raises(DataError, match="conversations written as one text"):
        demonstrations(tmp_path, chat, rows)
    if "<|" not in text:  # without a template, the text is what the model is given
        assert len(all_rows(demonstrations(tmp_path, plain, rows))) == 2 * N


@pytest.mark.parametrize(
    "text",
    [
        "Summarize this dialogue:\nUser: {} apples.\nAssistant: Good.\nUser: Bye.\nAssistant:",
        "User: {} apples.\nAssistant: Good.\n\nWhat did they buy?",
        "\n\nHuman: {} apples\n\nAssistant: Good.\n\nHuman: And?",
    ],
)
def test_a_dialogue_as_the_material_of_a_task_stays_one_text(tmp_path, chat, text):
    rows = [{"prompt": text.format(i), "completion": f"{i} apples"} for i in range(2 * N)]
    made = all_rows(demonstrations(tmp_path, chat, rows, dialogue_as_text=True))
    assert len(made) == 2 * N
    prompts = {row["prompt"][0]["content"] for row in made if len(row["prompt"]) == 1}
    assert prompts == {row["prompt"].strip() for row in rows}
    if "Human" not in text:  # which is read as messages
        with pytest.raises(DataError) as caught:
            demonstrations(tmp_path, chat, rows)
        assert "`dialogue_as_text: true`" in caught.value.remedy


@pytest.mark.parametrize(
    "prompt",
    ["Sum up: User: hi {}. Assistant: hello. User: bye.", "Question: {}?\nAnswer:", "a User: {}"],
)
def test_a_prompt_that_quotes_turns_is_a_prompt(tmp_path, chat, prompt):
    rows = [{"prompt": prompt.format(i), "completion": "a"} for i in range(2 * N)]
    assert len(all_rows(demonstrations(tmp_path, chat, rows))) == 2 * N


@pytest.mark.parametrize("more", ["<|eot_id|>\nHuman: and?", "<|im_end|>\n<|im_start|>user\nand?",
                                  " [INST] and? [/INST] yes"])  # fmt: skip
def test_answers_that_hold_more_turns_are_refused(tmp_path, chat, plain, more):
    rows = [{"prompt": f"q{i}", "completion": f"a{i}{more}"} for i in range(N)]
    for tokenizer in (chat, plain):
        with pytest.raises(DataError, match=f"{N} of {N} answers are several turns") as caught:
            demonstrations(tmp_path, tokenizer, rows)
        assert caught.value.where.endswith("d.jsonl:1")
    few = demonstrations(tmp_path, chat, [*PAIRS, *rows[:3]])
    assert len(all_rows(few)) == 63
    assert any(
        note.startswith("answers hold <|") or "[INST]" in note for note in few.report["notes"]
    )


@pytest.mark.parametrize("begin", ["<|im_start|>assistant\n", "Assistant: ", "### Response:\n",
                                   "<start_of_turn>model\n"])  # fmt: skip
def test_what_a_template_writes_around_prompts_and_answers_is_taken_off(
    tmp_path, chat, plain, begin
):
    rows = [{"prompt": f"<s>q{i}", "completion": f"{begin}a{i}<|im_end|>"} for i in range(2 * N)]
    prepared = demonstrations(tmp_path, chat, rows)
    assert all(row["prompt"][0]["content"][0] == "q" for row in all_rows(prepared))
    assert all(row["completion"][0]["content"][0] == "a" for row in all_rows(prepared))
    notes = " ".join(prepared.report["notes"])
    assert "prompts began with <s>, which was removed" in notes
    assert "answers began with" in notes
    if begin == "Assistant: ":  # without a template, the text is what the model is given
        kept = all_rows(demonstrations(tmp_path, plain, rows))
        assert all(row["completion"].startswith(begin) for row in kept)
        rows = [*PAIRS, rows[0]]  # one answer is no frame
        assert any(r["completion"][0]["content"].startswith(begin.strip())
                   for r in all_rows(demonstrations(tmp_path, chat, rows)))  # fmt: skip


@pytest.mark.parametrize("write", [json.dumps, str])
@pytest.mark.parametrize("keys", [("role", "content"), ("from", "value")])
def test_one_message_written_as_text_is_read(tmp_path, chat, write, keys):
    def said(text):
        return write(dict(zip(keys, ("assistant", text), strict=True)))

    rows = [{"prompt": f"q{i}", "chosen": said("a"), "rejected": said("b")} for i in range(N)]
    for row in all_rows(comparisons(tmp_path, chat, rows)):
        assert (row["chosen"], row["rejected"]) == (answer("a"), answer("b"))
    for role in ("admin", "user"):  # an answer in JSON is an answer
        text = write({"role": role, "content": "x"})
        rows = [{"prompt": f"q{i}", "completion": text} for i in range(N)]
        for row in all_rows(demonstrations(tmp_path, chat, rows)):
            assert row["completion"] == answer(text)


@pytest.mark.parametrize("prompt", [7, []])
def test_a_prompt_without_text_beside_answers_that_hold_theirs_is_no_matter(tmp_path, chat, prompt):
    rows = [{"prompt": prompt, "chosen": user(f"q{i}") + answer("a"),
             "rejected": user(f"q{i}") + answer("b")} for i in range(N)]  # fmt: skip
    assert len(all_rows(comparisons(tmp_path, chat, rows))) == N


@pytest.mark.parametrize(("role", "ours"), [("User", "user"), ("human", "user"), ("USER", "user")])
def test_other_names_of_roles_are_read(tmp_path, chat, role, ours):
    first = {"role": "developer", "content": "Be kind."}
    rows = [{"messages": [first, {"role": role, "content": f"q{i}"},
                          {"role": "Model", "content": "Hm."}, {"role": role, "content": "Yes?"},
                          {"role": "Model", "content": [{"type": "text", "text": f"a{i}"}]}]}
            for i in range(N)]  # fmt: skip
    prepared = demonstrations(tmp_path, chat, rows)
    for row in all_rows(prepared):
        assert [turn["role"] for turn in row["prompt"]] == ["system", ours, "assistant", ours]
        assert row["completion"] == answer("a" + row["prompt"][1]["content"][1:])
    assert f"the role {role} was read as {ours} ({N} rows)" in prepared.report["notes"]


def test_a_run_is_told_that_only_the_last_answer_is_trained_on(tmp_path, chat):
    turns = user("hi") + answer("hello")
    rows = [{"messages": [*user(f"q{i}"), *answer("hm"), *turns]} for i in range(N)]
    assert any("are not trained on" in note and f"({N} rows)" in note
               for note in demonstrations(tmp_path, chat, rows).report["notes"])  # fmt: skip
    rows = [{"messages": [*user(f"q{i}"), {**answer("hm")[0], "weight": 0}, *turns]}
            for i in range(N)]  # fmt: skip
    assert len(all_rows(demonstrations(tmp_path, chat, rows))) == N  # as the weight says
    rows = [{"messages": [*user(f"q{i}"), *answer("a"), *user("thanks")]} for i in range(N)]
    with pytest.raises(DataError, match="no answer after the last question") as caught:
        demonstrations(tmp_path, chat, rows)
    assert "d.jsonl:" in caught.value.given  # a row that was dropped, with its line


def test_rows_that_all_begin_with_the_same_turn_cannot_be_split(tmp_path, chat):
    rows = [{"messages": [*user("Hi."), *answer("Hello."), *user(f"q{i}"), *answer("a")]}
            for i in range(N)]  # fmt: skip
    rows.append(rows[0])  # a duplicate is not why
    with pytest.raises(DataError, match="same first user turn"):
        demonstrations(tmp_path, chat, rows)


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


@pytest.mark.parametrize("text", ["nan", "NaN", "<NA>", "#REF!", "#N/A"])
def test_an_empty_or_failed_cell_is_no_answer(tmp_path, plain, text):
    rows = [*PAIRS, *[{"prompt": f"p{i}", "completion": text} for i in range(5)]]
    prepared = demonstrations(tmp_path, plain, rows)
    assert len(all_rows(prepared)) == 60
    assert "5 an empty or failed cell" in prepared.lines[0]
    with pytest.raises(DataError, match="an empty or failed cell, such as nan") as caught:
        demonstrations(tmp_path, plain, rows[-5:])
    assert f"completion: {text}" in caught.value.given


def test_numbers_written_as_text_are_numbers(tmp_path, plain):
    rows = [{"prompt": f"q{i}", "completions": ["bad", "good"], "scores": ["9", "10"]}
            for i in range(N)]  # fmt: skip
    assert comparisons(tmp_path, plain, rows).train[0]["chosen"] == "good"
    rows = [{"prompt": f"q{i}", "chosen": "a", "rejected": "b", "score_chosen": "9",
             "score_rejected": "10"} for i in range(N)]  # fmt: skip
    with pytest.raises(DataError, match=f"{N} of {N} rows have a score_chosen below"):
        comparisons(tmp_path, plain, rows)


@pytest.mark.parametrize(("text", "note"), [
    ("caf\u00c3\u00a9", "looks decoded wrongly"), ("\u00e2\u20ac\u0153a", "looks decoded wrongly"),
    ("caf\ufffd", "characters were lost"), ("It&#39;s", "HTML entities"),
    ("a.\\nB", "in the place of line breaks"), ("a\r\nb", "line breaks of Windows"),
    ("a_x000D_", "as Excel writes"), ("[object Object]", "JavaScript"),
    ("x" * 64, "exactly 64 characters"),
])  # fmt: skip
def test_signs_of_a_faulty_conversion_are_told(tmp_path, plain, text, note):
    cut = text.startswith("xx")
    rows = [{"prompt": f"p{i}", "completion": f"{i:02}{text}"[: 64 if cut else None]}
            for i in range(N)]  # fmt: skip
    prepared = demonstrations(tmp_path, plain, [*PAIRS, *rows])
    assert [n for n in prepared.report["notes"] if note in n and f"({N} rows)" in n]
    assert len(all_rows(prepared)) == 60 + N  # as they are
    fine = [
        {"prompt": f"p{i}", "completion": f"caf\u00e9 \u00c3O \u00c2ngulo {i} & <b>"}
        for i in range(N)
    ]
    fine += [{"prompt": f"f{i}", "completion": rf"$\nabla \neq {i}$"} for i in range(N)]
    fine += [{"prompt": f"c{i}", "completion": f'print("{i}\\n")\nexit()'} for i in range(N)]
    assert demonstrations(tmp_path, plain, [*PAIRS, *fine]).report["notes"] == []


@pytest.mark.parametrize("prompt", [
    "<\uff5cUser\uff5c>q{}<\uff5cAssistant\uff5c>",
    "<|start|>user<|message|>q{}<|end|><|start|>assistant",
    "<|start_of_role|>user<|end_of_role|>q{}<|end_of_text|>", "<human>: q{}\n<bot>:",
    "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>q{}", "<|header_start|>user<|header_end|>\n\nq{}<|eot|>",
    "User: q{}\nBot:", "Instruct: q{}\nOutput:", "\u7528\u6237\uff1aq{}\n\u52a9\u624b\uff1a",
])  # fmt: skip
def test_turns_of_more_templates_are_no_prompt(tmp_path, chat, prompt):
    rows = [{"prompt": prompt.format(i), "completion": f"a{i}"} for i in range(N)]
    with pytest.raises(DataError, match="prompts are conversations written as one text"):
        demonstrations(tmp_path, chat, rows)


def test_the_name_of_an_answer_is_no_answer(tmp_path, plain):
    rows = [{"prompt": f"q{i}", "chosen": "A", "rejected": "B", "A": "good", "B": "bad"}
            for i in range(N)]  # fmt: skip
    with pytest.raises(DataError, match="column 'chosen' names an answer .A.: write the answer"):
        comparisons(tmp_path, plain, rows)


@pytest.mark.parametrize(("row", "note"), [
    ({"prompt": "q{}", "completion": "None"}, "the answer is None"),
    ({"prompt": "Say {{question}} {}", "completion": "a{}"}, "a name in braces"),
])  # fmt: skip
def test_what_a_program_left_unfilled_is_told(tmp_path, plain, row, note):
    rows = [{key: text.format(i) for key, text in row.items()} for i in range(N)]
    [told] = demonstrations(tmp_path, plain, rows).report["notes"]
    assert note in told and f"({N} rows)" in told


@pytest.mark.parametrize("text", ["b'a{}'", "['a{}']"])
def test_a_value_of_python_in_the_place_of_a_text_is_told(tmp_path, plain, text):
    rows = [{"prompt": f"q{i}", "completion": text.format(i)} for i in range(N)]
    [note] = demonstrations(tmp_path, plain, rows).report["notes"]
    assert "the text is Python's" in note and f"({N} rows)" in note


@pytest.mark.parametrize("templated", [True, False])
def test_prompts_that_the_tokenizer_changes_are_counted(tmp_path, templated):
    tokenizer = make_tokenizer(*[] if templated else [None])
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    rows = [{"prompt": f"Is {i} odd?", "completion": f"no {i}"} for i in range(N)]
    notes = demonstrations(tmp_path, tokenizer, rows).report["notes"]
    [note] = [n for n in notes if "the tokenizer changes prompts" in n]
    assert " odd?' is '" in note and "is " in note and f"({N} rows)" in note


def test_turns_written_as_text_in_other_ways_are_read(tmp_path, chat):
    ways = [
        lambda turns: json.dumps([{"id": 1, "name": "x", **turn} for turn in turns]),
        lambda turns: json.dumps(json.dumps(turns)),
        lambda turns: json.dumps({"messages": turns}),
    ]
    for write in ways:
        rows = [{"prompt": write(user(f"q{i}")), "completion": "a"} for i in range(N)]
        row = demonstrations(tmp_path, chat, rows).train[0]
        assert row["prompt"][0]["role"] == "user" and row["prompt"][0]["content"][0] == "q"
    records = [{"role": "admin", "content": "x", "n": 1}]  # an answer that is JSON is no turn
    people = [{"name": "Bo", "role": "user", "value": 3}]
    for answered in (records, [{"role": "admin", "user": "x"}], people, {"messages": user("q")}):
        text = json.dumps(answered)
        rows = [{"prompt": f"q{i}", "completion": text} for i in range(N)]
        assert demonstrations(tmp_path, chat, rows).train[0]["completion"] == answer(text)
    rows = [{"prompt": json.dumps([{"id": i, **records[0]}]), "completion": "a"} for i in range(N)]
    assert demonstrations(tmp_path, chat, rows).train[0]["prompt"][0]["content"][:7] == '[{"id":'


def test_pairs_of_openai_are_read(tmp_path, chat):
    rows = [{"input": {"messages": user(f"q{i}"), "tools": []}, "preferred_output": answer("a"),
             "non_preferred_output": answer("b")} for i in range(N)]  # fmt: skip
    row = comparisons(tmp_path, chat, rows).train[0]
    assert (row["chosen"], row["rejected"]) == (answer("a"), answer("b"))
    assert row["prompt"][0]["content"].startswith("q")


def test_ranks_and_scores_must_agree(tmp_path, plain):
    row = {"completions": ["a", "b", "c"], "ranks": [1, 2, 2]}
    rows = [{"prompt": f"q{i}", **row, "scores": [9 + i, 3, 2]} for i in range(N)]
    assert comparisons(tmp_path, plain, rows).train[0]["chosen"] == "a"
    rows = [{"prompt": f"q{i}", **row, "scores": [1, 3, 2]} for i in range(N)]
    with pytest.raises(DataError, match="'scores' .* contradict each other"):
        comparisons(tmp_path, plain, rows)


def test_a_prompt_beside_answers_that_hold_one_is_not_lost(tmp_path, chat):
    system = [{"role": "system", "content": "Be kind."}]

    def rows(prompt):
        return [{"prompt": prompt(i), "chosen": user(f"q{i}") + answer("a"),
                 "rejected": user(f"q{i}") + answer("b")} for i in range(N)]  # fmt: skip

    prepared = comparisons(tmp_path, chat, rows(lambda i: system + user(f"q{i}")))
    assert all(row["prompt"][0] == system[0] for row in all_rows(prepared))
    assert comparisons(tmp_path, chat, rows(lambda i: f"q{i}")).report["notes"] == []
    for prompt in (lambda i: f"another {i}", lambda i: system + user(f"another {i}")):
        [note] = comparisons(tmp_path, chat, rows(prompt)).report["notes"]
        assert note.startswith("the column prompt differs from the turns")


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
