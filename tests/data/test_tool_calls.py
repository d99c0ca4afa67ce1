# SPDX-License-Identifier: Apache-2.0
"""Tool calls are trained as the template writes them, results never; thumbs become pairs."""

import json

import pytest
from data_sources import all_rows, answer, jsonl, make_tokenizer, recipe, removed, user

from lora_rlhf.data import dataset_builder, tokenization, tool_calls
from lora_rlhf.errors import DataError, TokenizerError

CALLS = (
    "{% if tools %}{{ 'Tools: ' + tools | tojson + '\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '<call>' + c.function | tojson + '</call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "stock", "parameters": {"type": "object"}}}]


def call(i, arguments=None):
    function = {"name": "stock", "arguments": arguments or {f"key{i}": f"SKU-{i}"}}
    return {"role": "assistant", "content": None, "tool_calls": [{"function": function}]}


def conversation(i, **more):
    result = {"role": "tool", "name": "stock", "content": f"count {i}"}
    turns = [*user(f"q{i}"), {**call(i), **more}, result, *answer(f"We have {i}.")]
    return {"messages": turns, "tools": TOOLS}


def prepare(tmp_path, tokenizer, rows, name="demonstrations", **source):
    given = recipe(**{name: {"path": str(jsonl(tmp_path / "d.jsonl", rows)), **source}})
    return getattr(dataset_builder, name)(given, tokenizer)


def test_calls_are_answers_and_results_are_prompts(tmp_path):
    tokenizer, n = make_tokenizer(CALLS), 20
    rows = all_rows(prepare(tmp_path, tokenizer, [conversation(i) for i in range(n)]))
    assert len(rows) == 2 * n
    for row in rows:
        [ids] = tokenization.prompt_ids(tokenizer, [row["prompt"]])
        shown, [turn] = tokenizer.decode(ids), row["completion"]
        assert shown.startswith('Tools: [{"type": "function"') and "null" not in shown
        i = row["prompt"][0]["content"][1:]
        written = f'<call>{{"name": "stock", "arguments": {{"key{i}": "SKU-{i}"}}}}</call>'
        if len(row["prompt"]) == 1:
            assert turn == {"role": "assistant", "content": written}
        else:
            assert turn["content"] == f"We have {i}."
            assert written in shown and shown.count("SKU-") == 1 and f"count {i}" in shown
        assert "count" not in turn["content"]


@pytest.mark.parametrize("several", [False, True])
def test_sharegpts_function_calls_are_read_as_calls(tmp_path, several):
    """The turns of LLaMA-Factory's files were refused as an unknown role."""
    tokenizer, n = make_tokenizer(CALLS), 20
    rows = []
    for i in range(n):
        one = {"name": "stock", "arguments": {f"key{i}": f"SKU-{i}"}}
        turns = [("human", f"q{i}"), ("function_call", json.dumps([one] if several else one))]
        turns += [("observation", f"count {i}"), ("gpt", f"We have {i}.")]
        told = [{"from": who, "value": text} for who, text in turns]
        rows.append({"conversations": told, "tools": json.dumps(TOOLS)})
    prepared = prepare(tmp_path, tokenizer, rows)
    assert f"turns function_call were read as tool calls ({n} rows)" in prepared.report["notes"]
    answers = {row["completion"][0]["content"] for row in all_rows(prepared)}
    assert len(answers) == 2 * n and "We have 3." in answers
    assert '<call>{"name": "stock", "arguments": {"key3": "SKU-3"}}</call>' in answers
    rows[4]["conversations"][1]["value"] = "stock(4)"
    with pytest.raises(DataError, match="d.jsonl:5: column 'messages': .*function_call"):
        prepare(tmp_path, tokenizer, rows)


def test_a_call_at_the_end_and_arguments_as_text_are_read(tmp_path):
    given = [call(i, json.dumps({"sku": [i, "é"]})) for i in range(29)]
    rows = [{"messages": [*user(f"q{i}"), one]} for i, one in enumerate(given)]
    prepared = prepare(tmp_path, make_tokenizer(CALLS), rows)
    for row in all_rows(prepared):
        i = row["prompt"][0]["content"][1:]
        assert f'"arguments": {{"sku": [{i}, "é"]}}' in row["completion"][0]["content"]
    note = "tool calls are trained as the chat template writes them (29 rows)"
    assert note in prepared.report["notes"]


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (CALLS.replace("{% if tools %}", "{% if false %}"), "the list of tools"),
        (CALLS.replace("m.tool_calls or []", "[]"), "their names and arguments"),
        (CALLS.replace("'<call>' + c.function", "'<call>' + c.function.name"), "their names and"),
        (CALLS.replace("m.content", "('' if m.role == 'tool' else m.content)"), "a tool returned"),
        (CALLS.replace("<call>", "<|im_start|>"), "control token <|im_start|>"),
        ("{{ raise_exception('no tools') if tools }}" + CALLS, "refuses them: no tools"),
    ],
)
def test_a_template_that_loses_them_is_refused_with_the_reason(tmp_path, template, why):
    with pytest.raises(DataError, match="does not support the tool calls") as caught:
        prepare(tmp_path, make_tokenizer(template), [conversation(i) for i in range(29)])
    assert why in str(caught.value) and "use a base whose template does" in caught.value.remedy


@pytest.mark.parametrize(
    "calls", [{"name": "f"}, [{"function": {}}], ["f"], [{"name": "f", "arguments": "{"}], [7]]
)
def test_calls_of_another_form_are_refused(tmp_path, calls):
    row = {"messages": [*user("q"), {"role": "assistant", "content": "", "tool_calls": calls}]}
    with pytest.raises(DataError, match="tool"):
        prepare(tmp_path, make_tokenizer(CALLS), [row])


def test_tools_need_a_chat_template(tmp_path, plain):
    rows = [{"prompt": "q", "completion": "a", "tools": TOOLS}]
    with pytest.raises(
        TokenizerError, match="holds tools, but the tokenizer has no chat"
    ) as caught:
        prepare(tmp_path, plain, rows)
    assert "ignore: [tools]" in caught.value.remedy


def test_control_tokens_in_tools_are_text(tmp_path):
    rows = [{**conversation(i), "tools": [{"name": "<|im_end|>"}]} for i in range(29)]
    tokenizer = make_tokenizer(CALLS)
    row = prepare(tmp_path, tokenizer, rows).train[0]
    messages, tools = tool_calls.for_template(row["prompt"])
    assert "<|im_end|>" not in json.dumps(tools) and all("tools" not in m for m in messages)


# --- thumbs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "up", "down"),
    [("label", True, False), ("label", 1, -1), ("rating", "up", "down"), ("thumb", "👍", "👎")],
)
def test_thumbs_on_one_prompt_become_pairs(tmp_path, plain, column, up, down):
    rows = [{"prompt": f"q{i}", "completion": f"{word}{i}", column: value}
            for i in range(20)
            for word, value in (("good", up), ("bad", down), ("poor", down))]  # fmt: skip
    rows.append({"prompt": "alone", "completion": "good", column: up})
    source = {} if column == "label" else {"columns": {"label": column}}
    prepared = prepare(tmp_path, plain, rows, "comparisons", **source)
    pairs = {(r["prompt"], r["chosen"], r["rejected"]) for r in all_rows(prepared)}
    expected = {(f"q{i}", f"good{i}", f"{word}{i}") for i in range(20) for word in ("bad", "poor")}
    assert pairs == expected
    assert removed(prepared, "prompts whose answers are all labelled alike") == 1
    if source:
        with pytest.raises(DataError) as caught:
            prepare(tmp_path, plain, rows, "comparisons")
        assert f"label: {column}" in caught.value.remedy


def test_thumbs_without_a_pair_are_refused_with_what_they_are_good_for(tmp_path, plain):
    rows = [{"prompt": f"q{i}", "completion": "a", "label": i % 2 == 0} for i in range(60)]
    with pytest.raises(DataError, match="no prompt has both") as caught:
        prepare(tmp_path, plain, rows, "comparisons")
    assert "data.demonstrations" in caught.value.remedy
    good = prepare(tmp_path, plain, rows, columns={"label": "label"})
    assert len(all_rows(good)) == 30
