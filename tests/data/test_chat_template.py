# SPDX-License-Identifier: Apache-2.0
"""Answers are the text that a chat template writes after its generation prompt."""

import pytest
from data_sources import TEMPLATE, all_rows, answer, jsonl, make_tokenizer, recipe, user

from lora_rlhf.data import chat_template, dataset_builder

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
