# SPDX-License-Identifier: Apache-2.0
"""Answers are the text that a chat template writes after its generation prompt."""

import copy

import pytest
from data_sources import TEMPLATE, all_rows, answer, jsonl, make_tokenizer, recipe, user
from transformers import AutoTokenizer

from lora_rlhf import tiny
from lora_rlhf.data import chat_template, dataset_builder, filters, summaries, tokenization
from lora_rlhf.data.filters import FilteredSet
from lora_rlhf.data.row_formats import Example
from lora_rlhf.errors import DataError

_TURNS = (
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}{% else %}"
    "<|im_start|>assistantANSWER<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistantOPENED{% endif %}"
)
_SPLIT = (
    "{% set r = m.content.split('</think>')[0].split('<think>')[-1] if '</think>' in m.content "
    "else '' %}<think>{{ r }}</think>{{ m.content.split('</think>')[-1] }}"
)
_ANSWERS_ONLY = "{{ m.content.split('</think>')[-1] }}"


def turns(answer, opened):
    """A template that writes answers so, after a generation prompt that ends so."""
    return _TURNS.replace("ANSWER", answer).replace("OPENED", opened)


REASONED, PLAIN = "<think>why</think>It is 4.", "It is 4."


def trained(tmp_path, template, text):
    rows = [{"messages": user(f"q{i}") + answer(text)} for i in range(40)]
    path = jsonl(tmp_path / "d.jsonl", rows)
    tokenizer = make_tokenizer(template)
    prepared = dataset_builder.demonstrations(recipe(demonstrations=path), tokenizer)
    [completion] = {row["completion"][0]["content"] for row in all_rows(prepared)}
    return completion, prepared


@pytest.mark.parametrize(
    ("template", "text", "expected"),
    [
        (TEMPLATE, PLAIN, PLAIN),
        (turns(_SPLIT, "<think>"), REASONED, "why</think>It is 4."),
        (turns(_SPLIT, "<think>"), PLAIN, "</think>It is 4."),
        (turns(_ANSWERS_ONLY, "<think>"), REASONED, "why\n</think>It is 4."),
        (turns(_ANSWERS_ONLY, "<think>"), PLAIN, "\n</think>\n\nIt is 4."),
        (turns(_SPLIT, ""), PLAIN, "<think></think>It is 4."),
        (TEMPLATE.split("{% if")[0], PLAIN, PLAIN),  # no generation prompt
        (turns(": {{ m.content | trim }}", ":"), f"{PLAIN} ", f" {PLAIN}"),
    ],
)  # fmt: skip
def test_an_answer_is_what_the_template_writes(tmp_path, template, text, expected):
    completion, prepared = trained(tmp_path, template, text)
    assert completion == expected
    same = expected == text and template == TEMPLATE
    assert bool(prepared.report["notes"]) != same, "the difference is counted"
    assert [line.strip() for line in prepared.lines[1:-1]] == prepared.report["notes"]


def test_the_end_of_a_turn_is_the_token_that_the_template_writes():
    assert chat_template.turn_end(make_tokenizer()) == "<|im_end|>"
    assert chat_template.turn_end(make_tokenizer(None)) is None
    assert chat_template.turn_end(make_tokenizer("{{ messages[-1].content }}")) is None


def test_of_several_templates_the_usual_one_counts():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"default": TEMPLATE, "rag": "{{ messages[-1].content }}"}
    assert chat_template.turn_end(tokenizer) == "<|im_end|>"
    assert chat_template.markers(tokenizer) == chat_template.markers(make_tokenizer())


@pytest.mark.parametrize(("template", "role"), [
    ("{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.content }}{% endfor %}",
     "system"),
    ("<|im_start|>{{ messages[-1].content }}", "user"),
    (TEMPLATE.replace("m.content", "m.content | replace('the', 'a')"), "user"),
])  # fmt: skip
def test_a_turn_that_the_template_does_not_write_is_told_or_stops(tmp_path, template, role):
    tokenizer = make_tokenizer(template)
    system = [{"role": "system", "content": "In French."}]
    first = [*system * (role == "system"), *user("What is the plan?")]
    rows = [{"messages": [*(first if i % 4 == 0 else []), *answer("hm") * (i % 4 == 0),
                          *user(f"q{i}"), *answer(f"a{i}")]} for i in range(80)]  # fmt: skip
    path = jsonl(tmp_path / "d.jsonl", rows)
    with pytest.raises(DataError, match=f"leaves out or changes what the {role} says") as caught:
        dataset_builder.demonstrations(recipe(demonstrations=path, max_lost=0.2), tokenizer)
    assert "data.max_lost: 0.25 trains without" in caught.value.remedy
    notes = dataset_builder.demonstrations(recipe(demonstrations=path), tokenizer).report["notes"]
    assert any(f"what the {role} says" in note and "(20 rows)" in note for note in notes)


def test_reasoning_and_white_space_that_a_template_drops_is_no_loss(tmp_path):
    template = TEMPLATE.replace("m.content", "m.content.split('</think>')[-1] | trim")
    middle = [*answer("<think>so</think>a"), *user("b"), *answer("c")]
    rows = [{"messages": [*user(f" q{i} "), *middle]}
            for i in range(40)]  # fmt: skip
    path = jsonl(tmp_path / "d.jsonl", rows)
    prepared = dataset_builder.demonstrations(recipe(demonstrations=path), make_tokenizer(template))
    assert not any("leaves out or changes" in note for note in prepared.report["notes"])


@pytest.mark.parametrize(("ending", "count"), [("assistant\n", 0), ("lang", 40)])
def test_ids_that_the_whole_text_would_split_otherwise_are_noted(tmp_path, ending, count):
    """A template's text is compared as ids too: `lang` and `uage` are one token together."""
    tokenizer = AutoTokenizer.from_pretrained(tiny.path())
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}ENDING{% endif %}{{ m.content }}\n"
        "{% endfor %}{% if add_generation_prompt %}ENDING{% endif %}"
    ).replace("ENDING", ending)
    example = Example(user("Which one?"), [answer("uage: Finnish")])
    kept = FilteredSet("demonstrations")
    filters.follow_template(kept, [copy.deepcopy(example) for _ in range(40)], tokenizer)
    noted = [n for note, n in kept.notes.items() if "would become one token" in note]
    assert noted == [count] * bool(count)
    alike = tokenization.split_alike(tokenizer, user("Which one?"), "uage: Finnish")
    assert alike is not bool(count)


def test_a_set_with_very_many_notes_points_to_the_record():
    report = {
        "counts": {}, "rows": 9, "train": 6, "held_out": 3, "read_as": ["messages"],
        "sources": [{"columns_not_read": [f"c{i}" for i in range(300)]}],
        "notes": [f"note {i}" for i in range(300)],
    }  # fmt: skip
    row = {"prompt": user("q"), "completion": answer("a")}
    made = summaries.lines("demonstrations", report, row, make_tokenizer(TEMPLATE))
    assert len(made) == 23 and "280 more notes, under data.demonstrations in" in made[21]
    assert "c19 and 280 more columns" in made[0] and "c20" not in made[0]
