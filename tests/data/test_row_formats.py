# SPDX-License-Identifier: Apache-2.0
"""Layouts of rows: the columns that are understood, and what they become."""

import pytest
from data_sources import (
    PAIRS,
    PREFS,
    all_rows,
    answer,
    jsonl,
    recipe,
    removed,
    user,
)

from lora_rlhf.data import dataset_builder, filters
from lora_rlhf.errors import DataError, TokenizerError


def test_unknown_columns_suggest_a_mapping_that_works(tmp_path, plain):
    rows = [{"instruction": f"q{i}", "response": f"a{i}"} for i in range(40)]
    path = jsonl(tmp_path / "d.jsonl", rows)
    with pytest.raises(DataError) as caught:
        dataset_builder.demonstrations(recipe(demonstrations=path), plain)
    assert "columns: {prompt: instruction, completion: response}" in caught.value.remedy
    assert caught.value.given.count("d.jsonl:") == 5
    columns = {"prompt": "instruction", "completion": "response"}
    prepared = dataset_builder.demonstrations(
        recipe(demonstrations={"path": str(path), "columns": columns}), plain
    )
    assert {r["completion"] for r in all_rows(prepared)} == {f"a{i}" for i in range(40)}
    with pytest.raises(DataError, match="no column 'answer'.*\n.*instruction, response"):
        columns = {"prompt": "instruction", "completion": "answer"}
        dataset_builder.demonstrations(
            recipe(demonstrations={"path": str(path), "columns": columns}), plain
        )


@pytest.mark.parametrize("bad", [None, 3, ["x"], [{"role": "critic", "content": "x"}], [], {}])
def test_rows_of_a_wrong_type_are_listed_with_their_lines(tmp_path, chat, bad):
    rows = [*PAIRS[:2], *[{"prompt": "q", "completion": bad}] * 7, {"prompt": "q"}]
    with pytest.raises(DataError) as caught:
        dataset_builder.demonstrations(
            recipe(demonstrations=jsonl(tmp_path / "d.jsonl", rows)), chat
        )
    assert caught.value.where.endswith("d.jsonl:3")
    assert caught.value.given.startswith("8 of 10 rows do not fit prompt + completion")
    listed = caught.value.given.splitlines()[1:]
    assert [line.split(":")[1] for line in listed] == list("34567")
    assert all("column 'completion'" in line for line in listed)
    assert "messages" in caught.value.expected


def test_messages_need_a_chat_template(tmp_path, plain):
    rows = [{"messages": user("q") + answer("a")}]
    with pytest.raises(TokenizerError, match="no chat template") as caught:
        dataset_builder.demonstrations(
            recipe(demonstrations=jsonl(tmp_path / "d.jsonl", rows)), plain
        )
    assert caught.value.where.endswith("d.jsonl:1")


CONVERSATION = [*user("q%d"), *answer("hm?"), *user("more")]


def filled(turns, i):
    return [{**t, "content": t["content"].replace("%d", str(i))} for t in turns]


def demonstration_layouts(i):
    prompt = filled(CONVERSATION, i)
    yield {"prompt": prompt, "completion": answer("good")}
    yield {"messages": prompt + answer("good"), "prompt_id": 7}
    yield {"prompt": prompt, "chosen": answer("good"), "rejected": answer("bad")}
    yield {"chosen": prompt + answer("good"), "rejected": prompt + answer("bad")}
    # UltraFeedback: the prompt as a column of its own, and again in chosen
    yield {"prompt": f"q{i}", "chosen": prompt + answer("good"), "rejected": prompt + answer("bad")}
    yield {"prompt": prompt, "completions": ["bad", "good", "bad"], "ranks": [3, 1, 2]}
    yield {
        f: f"\n\nHuman: q{i}\n\nAssistant: hm?\n\nHuman: more\n\nAssistant: {a}"
        for f, a in (("chosen", "good"), ("rejected", "bad"))
    }


@pytest.mark.parametrize("layout", range(7))
def test_every_layout_gives_the_same_conversation(tmp_path, chat, layout):
    rows = [list(demonstration_layouts(i))[layout] for i in range(40)]
    path = jsonl(tmp_path / "d.jsonl", rows)
    prepared = dataset_builder.demonstrations(recipe(demonstrations=path), chat)
    wanted = [{"prompt": filled(CONVERSATION, i), "completion": answer("good")} for i in range(40)]
    assert sorted(all_rows(prepared), key=str) == sorted(wanted, key=str)
    if layout == 4:  # there the explicit prompt is the first turn only
        return
    prepared = dataset_builder.prompts(recipe(prompts=path), chat)
    assert sorted(map(str, all_rows(prepared))) == sorted(
        str({"prompt": w["prompt"]}) for w in wanted
    )


@pytest.mark.parametrize("layout", [2, 3, 4, 6])
def test_every_preference_layout_gives_the_same_pair(tmp_path, chat, layout):
    rows = [list(demonstration_layouts(i))[layout] for i in range(40)]
    prepared = dataset_builder.comparisons(
        recipe(comparisons=jsonl(tmp_path / "d.jsonl", rows)), chat
    )
    by_prompt = {row["prompt"][0]["content"]: row for row in all_rows(prepared)}
    assert len(by_prompt) == 40
    assert by_prompt["q7"]["prompt"] == filled(CONVERSATION, 7)
    assert by_prompt["q7"]["chosen"] == answer("good")
    assert by_prompt["q7"]["rejected"] == answer("bad")


def test_conversations_that_diverge_early_are_no_comparison(tmp_path, chat):
    """Stages encode one prompt and one answer, and would drop the turns between them."""
    tails = {"chosen": [*answer("hello"), *user("go on"), *answer("yes")], "rejected": answer("no")}
    rows = [{key: user(f"q{i}") + tail for key, tail in tails.items()} for i in range(40)]
    path = jsonl(tmp_path / "d.jsonl", rows)
    row = dataset_builder.demonstrations(recipe(demonstrations=path), chat).train[0]
    assert row["completion"] == answer("yes")
    assert row["prompt"][1:] == tails["chosen"][:-1]
    with pytest.raises(DataError, match="answers that differ before their last turn: 40 -> 0"):
        dataset_builder.comparisons(recipe(comparisons=path), chat)
    path = jsonl(tmp_path / "e.jsonl", [*rows, *PREFS])
    prepared = dataset_builder.comparisons(recipe(comparisons=path, max_lost=0.5), chat)
    assert removed(prepared, "answers that differ before their last turn") == 40
    with pytest.raises(DataError, match="40% of the comparisons are dropped as: answers that diff"):
        dataset_builder.comparisons(recipe(comparisons=path, max_lost=0.3), chat)


def test_plain_text_is_wrapped_only_with_a_chat_template(tmp_path, chat, plain):
    path = jsonl(tmp_path / "d.jsonl", PREFS)
    prepared = dataset_builder.comparisons(recipe(comparisons=path), chat)
    row = prepared.train[0]
    assert row["prompt"][0]["role"] == "user" and row["chosen"][0]["role"] == "assistant"
    assert prepared.report["notes"] == [
        "plain text was wrapped into one user and one assistant message (60 rows)"
    ]
    prepared = dataset_builder.comparisons(recipe(comparisons=path), plain)
    row = prepared.train[0]
    assert (row["chosen"], row["rejected"]) == tuple(
        row["prompt"].replace("q", name) for name in ("good", "poor")
    )
    assert prepared.report["notes"] == []


def test_texts_with_a_common_beginning_are_cut_between_words(tmp_path, plain):
    rows = [
        {"chosen": f"Line {i}: the sky is blue", "rejected": f"Line {i}: the sky is black"}
        for i in range(40)
    ]
    prepared = dataset_builder.comparisons(
        recipe(comparisons=jsonl(tmp_path / "d.jsonl", rows)), plain
    )
    row = prepared.train[0]
    assert row["prompt"].endswith("the sky is")
    assert (row["chosen"], row["rejected"]) == (" blue", " black")


def test_transcripts_stay_transcripts_without_a_chat_template(tmp_path, plain):
    rows = [list(demonstration_layouts(i))[6] for i in range(40)]
    prepared = dataset_builder.comparisons(
        recipe(comparisons=jsonl(tmp_path / "d.jsonl", rows)), plain
    )
    row = min(all_rows(prepared), key=lambda row: row["group"])
    assert row["prompt"].endswith("\n\nHuman: more\n\nAssistant:")
    assert (row["chosen"], row["rejected"]) == (" good", " bad")
    assert filters.first_turn(row["prompt"]).startswith("q")


def test_rankings_become_all_strict_pairs_of_one_group(tmp_path, plain):
    rows = [
        {"prompt": f"q{i}", "completions": ["c", "a", "b", "b2"], "ranks": [3, 1, 2, 2]}
        for i in range(40)
    ]
    prepared = dataset_builder.comparisons(
        recipe(comparisons=jsonl(tmp_path / "d.jsonl", rows)), plain
    )
    pairs = {}
    for row in all_rows(prepared):
        pairs.setdefault((row["prompt"], row["group"]), set()).add(row["chosen"] + row["rejected"])
    assert len(pairs) == 40
    assert all(p == {"ab", "ab2", "ac", "bc", "b2c"} for p in pairs.values())
    assert prepared.report["counts"]["expanded to pairs"] == {"before": 40, "after": 240}
    assert removed(prepared, "ties") == 40


@pytest.mark.parametrize(
    ("change", "message"),
    [({"ranks": [1]}, "a list of 2 numbers"), ({"ranks": [1, "x"]}, "a list of 2 numbers"),
     ({"completions": ["a"]}, "two or more"), ({"completions": "ab"}, "two or more"),
     ({"completions": ["a", None]}, "column 'completions' is missing")],
)  # fmt: skip
def test_broken_rankings_are_refused(tmp_path, plain, change, message):
    row = {"prompt": "q", "completions": ["a", "b"], "ranks": [1, 2]}
    path = jsonl(tmp_path / "d.jsonl", [row, {**row, **change}])
    with pytest.raises(DataError, match=message) as caught:
        dataset_builder.comparisons(recipe(comparisons=path), plain)
    assert caught.value.where.endswith(":2")


def test_margins_are_kept_when_every_row_has_one(tmp_path, plain):
    rows = [{**row, "margin": i} for i, row in enumerate(PREFS)]
    prepared = dataset_builder.comparisons(
        recipe(comparisons=jsonl(tmp_path / "d.jsonl", rows)), plain
    )
    assert all(row["prompt"] == f"q{row['margin']:.0f}" for row in all_rows(prepared))
    del rows[3]["margin"]
    prepared = dataset_builder.comparisons(
        recipe(comparisons=jsonl(tmp_path / "d.jsonl", rows)), plain
    )
    assert "margin" not in prepared.train.column_names
    assert prepared.report["notes"] == ["margin left out: not every row has one (60 rows)"]


@pytest.mark.parametrize("bad", ["NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 400, "true"])
def test_a_number_that_is_not_finite_is_refused_with_its_line(tmp_path, plain, bad):
    row = '{"prompt": "q", "chosen": "a", "rejected": "b", "margin": %s}\n'
    (tmp_path / "m.jsonl").write_text(row % 1 + row % bad)
    with pytest.raises(DataError, match="column 'margin' must be a finite number") as caught:
        dataset_builder.comparisons(recipe(comparisons=tmp_path / "m.jsonl"), plain)
    assert caught.value.where.endswith("m.jsonl:2")
    row = '{"prompt": "q", "completions": ["a", "b"], "ranks": [1, %s]}\n'
    (tmp_path / "r.jsonl").write_text(row % 2 + row % bad)
    with pytest.raises(DataError, match="column 'ranks' must be a list of 2 numbers") as caught:
        dataset_builder.comparisons(recipe(comparisons=tmp_path / "r.jsonl"), plain)
    assert caught.value.where.endswith("r.jsonl:2")


def test_margins_of_a_csv_are_numbers(tmp_path, plain):
    lines = [f"q{i},good{i},poor{i},{i / 2}" for i in range(40)]
    path = tmp_path / "d.csv"
    path.write_text("\n".join(["prompt,chosen,rejected,margin", *lines]))
    prepared = dataset_builder.comparisons(recipe(comparisons=path), plain)
    assert all(row["prompt"] == f"q{2 * row['margin']:.0f}" for row in all_rows(prepared))
    path.write_text("\n".join(["prompt,chosen,rejected,margin", *lines, "q,a,b, "]))
    prepared = dataset_builder.comparisons(recipe(comparisons=path), plain)
    assert prepared.report["notes"] == ["margin left out: not every row has one (41 rows)"]
    path.write_text("\n".join(["prompt,chosen,rejected,margin", *lines, "q,a,b,much"]))
    with pytest.raises(DataError, match="a finite number: much"):
        dataset_builder.comparisons(recipe(comparisons=path), plain)


def sharegpt(turns):
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[turn["role"]], "value": turn["content"]} for turn in turns]


@pytest.mark.parametrize("keys", [("role", "content"), ("from", "value")])
def test_lists_of_roles_and_contents_are_messages(tmp_path, chat, keys):
    """`datasets` makes them of a sequence of structs."""
    rows = []
    for i in range(40):
        turns = filled(CONVERSATION, i) + answer("good")
        lists = {keys[0]: [t["role"] for t in turns], keys[1]: [t["content"] for t in turns]}
        rows.append({"messages": lists})
    prepared = dataset_builder.demonstrations(
        recipe(demonstrations=jsonl(tmp_path / "d.jsonl", rows)), chat
    )
    wanted = [{"prompt": filled(CONVERSATION, i), "completion": answer("good")} for i in range(40)]
    assert sorted(all_rows(prepared), key=str) == sorted(wanted, key=str)
    assert "lists of roles and of contents were read as turns (40 rows)" in prepared.report["notes"]
    rows[6]["messages"][keys[0]].pop()
    with pytest.raises(DataError, match="1 of 40 rows do not fit messages"):
        path = jsonl(tmp_path / "d.jsonl", rows)
        dataset_builder.demonstrations(recipe(demonstrations=path), chat)


@pytest.mark.parametrize("name", ["demonstrations", "comparisons"])
def test_two_answers_in_a_list_get_a_remedy_that_can_be_done(tmp_path, chat, name):
    """`columns: {completion: output}` led to the next error."""
    rows = [{"instruction": f"q{i}", "output": ["a", "b"]} for i in range(40)]
    path = jsonl(tmp_path / "d.jsonl", rows)
    with pytest.raises(DataError) as caught:
        getattr(dataset_builder, name)(recipe(**{name: path}), chat)
    assert "'output' is a list of texts: write the better one" in caught.value.remedy
    assert "columns:" not in caught.value.remedy


def test_sharegpt_conversations_are_messages(tmp_path, chat):
    turns = [{"role": "system", "content": "be kind"}, *CONVERSATION]
    rows = [{"conversations": sharegpt(filled(turns, i) + answer("good"))} for i in range(40)]
    path = jsonl(tmp_path / "d.jsonl", rows)
    prepared = dataset_builder.demonstrations(recipe(demonstrations=path), chat)
    wanted = [{"prompt": filled(turns, i), "completion": answer("good")} for i in range(40)]
    assert sorted(all_rows(prepared), key=str) == sorted(wanted, key=str)
    note = "turns of from and value (ShareGPT) were read as messages (40 rows)"
    assert prepared.report["notes"][0] == note
    assert len(all_rows(dataset_builder.prompts(recipe(prompts=path), chat))) == 40
    rows = [
        {
            "conversations": sharegpt(filled(turns, i)),
            "chosen": sharegpt(answer("good"))[0],
            "rejected": sharegpt(answer("bad"))[0],
        }
        for i in range(40)
    ]
    prepared = dataset_builder.comparisons(
        recipe(comparisons=jsonl(tmp_path / "c.jsonl", rows)), chat
    )
    row = min(all_rows(prepared), key=lambda row: row["group"])
    assert row["prompt"][0] == turns[0] and len(row["prompt"]) == 4
    assert (row["chosen"], row["rejected"]) == (answer("good"), answer("bad"))
    with pytest.raises(DataError, match="no message with text"):
        rows = [{"conversations": [{"from": "alien", "value": "x"}]}]
        dataset_builder.demonstrations(
            recipe(demonstrations=jsonl(tmp_path / "e.jsonl", rows)), chat
        )


def test_conversations_may_hold_messages(tmp_path, chat):
    rows = [{"conversations": filled(CONVERSATION, i) + answer("good")} for i in range(40)]
    prepared = dataset_builder.demonstrations(
        recipe(demonstrations=jsonl(tmp_path / "d.jsonl", rows)), chat
    )
    assert len(all_rows(prepared)) == 40
    assert all(note.startswith("answers before the last one") for note in prepared.report["notes"])


def test_a_files_own_column_item_is_not_a_task_item(tmp_path, plain):
    rows = [{**row, "item": "sku-7"} for row in PREFS]
    prepared = dataset_builder.comparisons(
        recipe(comparisons=jsonl(tmp_path / "d.jsonl", rows)), plain
    )
    assert "gold_margin" not in prepared.held_out.column_names
    prepared = dataset_builder.prompts(recipe(prompts=str(tmp_path / "d.jsonl")), plain)
    assert prepared.train.column_names == ["prompt"]


def rated(text, *ratings):
    """A completion of openbmb/UltraFeedback."""
    aspects = ("instruction_following", "honesty", "truthfulness", "helpfulness")
    given = [{"Rating": rating, "Rationale": "because"} for rating in ratings]
    return {
        "annotations": dict(zip(aspects, given, strict=True)), "critique": "well",
        "custom_system_prompt": "You are kind.", "fine-grained_score": 1.0, "model": "m",
        "overall_score": 10.0, "principle": "helpfulness", "response": text,
    }  # fmt: skip


def test_ultrafeedback_ranks_by_the_mean_of_its_ratings(tmp_path, chat):
    worse, better = rated("worse", "1", "2", "N/A", "3"), rated("better", "5", "5", "4", "5")
    row = {
        "source": "evol_instruct", "models": ["a", "b", "c"], "correct_answers": ["None"],
        "incorrect_answers": ["None"], "completions": [worse, rated("none", *["N/A"] * 4), better],
    }  # fmt: skip
    rows = [{**row, "instruction": f"question {i}", "source": f"s{i}"} for i in range(40)]
    rows[1]["correct_answers"] = ["yes"]
    path = jsonl(tmp_path / "u.jsonl", rows)
    pairs = dataset_builder.comparisons(recipe(comparisons=path, held_out=0.5), chat)
    for pair in all_rows(pairs):
        assert (pair["chosen"], pair["rejected"]) == (answer("better"), answer("worse"))
    assert "UltraFeedback's columns were read (40 rows)" in pairs.report["notes"]
    prepared = dataset_builder.demonstrations(recipe(demonstrations=path, held_out=0.5), chat)
    assert {r["completion"][0]["content"] for r in all_rows(prepared)} == {"better"}


@pytest.mark.parametrize("columns", ["first", "cleaned", "zephyr"])
def test_binarized_ultrafeedback(tmp_path, chat, columns):
    """argilla's ultrafeedback-binarized-preferences (and -cleaned), and HuggingFaceH4's."""
    rows = []
    for i in range(40):
        question, good, bad = f"question {i}", f"good {i}", f"bad {i}"
        both = [user(question) + answer(good), user(question) + answer(bad)]
        row = {"source": "sharegpt", "prompt": question, "chosen": both[0], "rejected": both[1]}
        if columns == "first":
            row = {"source": "sharegpt", "instruction": question, "chosen_response": good}
            row |= {"rejected_response": bad, "chosen_model": "m", "rejected_model": "n"}
            row |= {"chosen_avg_rating": 5.0, "rejected_avg_rating": 4.5 + i % 2 / 4}
        elif columns == "cleaned":
            row |= {"chosen-rating": 5.0, "rejected-rating": 4.5 + i % 2 / 4}
            row |= {"chosen-model": "m", "rejected-model": "n"}
        else:
            row |= {"prompt_id": f"p{i}", "messages": both[0]}
            row |= {"score_chosen": 8.0, "score_rejected": 7.5 + i % 2 / 4}
        rows.append(row)
    pairs = dataset_builder.comparisons(
        recipe(comparisons=jsonl(tmp_path / "b.jsonl", rows), held_out=0.5), chat
    )
    assert len(all_rows(pairs)) == 40
    for pair in all_rows(pairs):
        number = pair["prompt"][-1]["content"].removeprefix("question ")
        assert (pair["chosen"], pair["rejected"]) == (
            answer(f"good {number}"),
            answer(f"bad {number}"),
        )


ATTRIBUTES = ("correctness", "coherence", "complexity", "verbosity")


def rated_row(prompt, response, helpfulness):
    """A row of nvidia/HelpSteer2."""
    others = dict.fromkeys(ATTRIBUTES, 2)
    return {"prompt": prompt, "response": response, "helpfulness": helpfulness, **others}


def test_helpsteer2_ranks_the_answers_of_consecutive_rows(tmp_path, chat):
    first = "{}\n<extra_id_1>Assistant\nWhich one?\n<extra_id_1>User\nThe blue one."
    rows = []
    for i in range(40):
        prompt = first.format(f"question {i}") if i % 2 else f"question {i}"
        tie = i == 7
        rows += [rated_row(prompt, "worse", 4 if tie else 1), rated_row(prompt, "better", 4)]
    path = jsonl(tmp_path / "h.jsonl", rows)
    pairs = dataset_builder.comparisons(recipe(comparisons=path, held_out=0.5), chat)
    assert removed(pairs, "ties") == 1
    assert "HelpSteer's columns were read (80 rows)" in pairs.report["notes"]
    for pair in all_rows(pairs):
        assert (pair["chosen"], pair["rejected"]) == (answer("better"), answer("worse"))
        several = int(pair["prompt"][0]["content"].removeprefix("question ")) % 2
        assert pair["prompt"][1:] == (answer("Which one?") + user("The blue one.")) * several
    prepared = dataset_builder.demonstrations(recipe(demonstrations=path, held_out=0.5), chat)
    best = [row["completion"][0]["content"] for row in all_rows(prepared)]
    assert len(best) == 40 and best.count("better") == 39
    prepared = dataset_builder.prompts(recipe(prompts=path, held_out=0.5), chat)
    assert len(all_rows(prepared)) == 40


@pytest.mark.parametrize("bad", ["alone", "empty", "word"])
def test_broken_rows_of_helpsteer2_are_refused(tmp_path, chat, bad):
    rows = [rated_row(f"q{i // 2}", f"a{i}", i % 2) for i in range(60)]
    if bad == "alone":
        del rows[11]
    else:
        rows[10]["helpfulness"] = {"empty": None, "word": "good"}[bad]
    with pytest.raises(DataError, match="1 of 30 rows do not fit") as caught:
        path = jsonl(tmp_path / "h.jsonl", rows)
        dataset_builder.comparisons(recipe(comparisons=path), chat)
    assert caught.value.where.endswith("h.jsonl:11")
    source = {"path": str(path), "skip_bad": 1}
    assert len(all_rows(dataset_builder.comparisons(recipe(comparisons=source), chat))) == 29


@pytest.mark.parametrize("version", [2, 3])
def test_preferences_of_helpsteer(tmp_path, chat, version):
    """HelpSteer2's (folder preference) and HelpSteer3's: -3 is for the first answer."""
    rows = []
    for i in range(40):
        question, preference = f"question {i}", (-3, 1, 2, 0)[i % 4]
        good_first = preference < 0
        both = ("good", "bad") if good_first else ("bad", "good")
        if version == 3:
            row = {"domain": "general", "language": "english", "context": user(question)}
            row |= {"response1": both[0], "response2": both[1], "overall_preference": preference}
            row |= {"individual_preference": [{"score": preference, "reasoning": "clear"}]}
        else:
            row = {"split": "train", "prompt": question, "preference_strength": preference}
            row |= {"response_1": both[0], "response_2": both[1], "preference_statement": "clear"}
        rows.append(row)
    path = jsonl(tmp_path / "p.jsonl", rows)
    pairs = dataset_builder.comparisons(recipe(comparisons=path, held_out=0.5), chat)
    assert len(all_rows(pairs)) == 30 and removed(pairs, "ties") == 10
    for pair in all_rows(pairs):
        assert (pair["chosen"], pair["rejected"]) == (answer("good"), answer("bad"))
    prepared = dataset_builder.prompts(recipe(prompts=path, held_out=0.5), chat)
    assert len(all_rows(prepared)) == 40
    rows[5]["overall_preference" if version == 3 else "preference_strength"] = "first"
    with pytest.raises(DataError, match="a list of 2 numbers") as caught:
        dataset_builder.comparisons(recipe(comparisons=jsonl(path, rows)), chat)
    assert caught.value.where.endswith("p.jsonl:6")
