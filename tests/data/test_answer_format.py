# SPDX-License-Identifier: Apache-2.0
"""The form of an answer: what each check refuses, and checks that are wrong themselves."""

import pytest
from data_sources import all_rows, jsonl, recipe, removed
from pydantic import ValidationError

from lora_rlhf import extras
from lora_rlhf.data import dataset_builder
from lora_rlhf.data.answer_format import problems, validate
from lora_rlhf.errors import DataError, SetupError

SCHEMA = {"type": "object", "required": ["age"], "properties": {"age": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("text", "checks", "expected"),
    [
        ("anything at all", {}, []),
        ("one two three", {"max_words": 3}, []),
        ("one two three", {"max_words": 2}, ["3 words, at most 2 are allowed"]),
        ("- a\n  goes on\n\n* b", {"bullets": True}, []),
        ("- a\n- b", {"bullets": 2}, []),
        ("- a\n- b", {"bullets": 3}, ["2 bullets instead of 3"]),
        ("Here:\n- a", {"bullets": 1}, ["line 1 does not begin with '- ': Here:"]),
        ("", {"bullets": True}, ["no line begins with '- '"]),
        ("x", {"bullets": False}, []),
        ("yes", {"regex": "yes|no"}, []),
        ("yes, of course", {"regex": "yes|no"}, ["the answer does not match yes|no"]),
        ('{"age": 3}', {"json_schema": SCHEMA}, []),
        ('{"age": "3"}', {"json_schema": SCHEMA}, ["JSON at $.age: '3' is not of type 'integer'"]),
        ('{"age": 3', {"json_schema": SCHEMA},
         ["not JSON: Expecting ',' delimiter at line 1, column 10"]),
        ('{"age": NaN}', {"json_schema": True}, ["not JSON: NaN is not JSON"]),
        ("a b", {"max_words": 1, "regex": "c"}, ["2 words, at most 1 are allowed",
                                                 "the answer does not match c"]),
    ],
)  # fmt: skip
def test_what_breaks_a_format(text, checks, expected):
    validate(checks)
    assert problems(text, checks) == expected


def test_an_expression_that_needs_for_ever_is_stopped(monkeypatch):
    monkeypatch.setattr("lora_rlhf.data.answer_format._SECONDS", 0.05)
    assert "takes over" in problems("a" * 60 + "!", {"regex": "(a|a)*b|(a|aa)+$x"})[0]


@pytest.mark.parametrize(
    ("checks", "reason"),
    [
        ({"max_word": 3}, "unknown key 'max_word'"),
        ({"max_words": 0}, "max_words is 0"),
        ({"max_words": True}, "max_words is True"),
        ({"bullets": "3"}, "bullets is 3"),
        ({"regex": "("}, "regex is invalid"),
        ({"json_schema": {"type": "text"}}, "json_schema is invalid at"),
        ({"json_schema": "x.json"}, "not a JSON schema"),
    ],
)
def test_checks_that_cannot_be_carried_out(checks, reason):
    with pytest.raises(ValueError, match=reason):
        validate(checks)


def test_a_schema_fetches_nothing_from_the_network():
    with pytest.raises(ValueError, match="which it does not hold"):
        problems("{}", {"json_schema": {"$ref": "http://127.0.0.1:9/schema.json"}})


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "jsonschema", None)
    with pytest.raises(SetupError, match="lora-rlhf.hygiene"):
        validate({"json_schema": {}})
    with pytest.raises(SetupError, match="no_such"):
        extras.load("no_such.module", "x", "hygiene")


ROWS = [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(60)]


@pytest.mark.parametrize("form", [{"max_words": 1}, {"regex": "a[0-9]+"}])
def test_answers_of_another_form_are_errors_with_their_place(tmp_path, plain, form):
    rows = [*ROWS, {"prompt": "q", "completion": "b b"}]
    source = {"path": str(jsonl(tmp_path / "d.jsonl", rows)), "format": form}
    with pytest.raises(DataError, match=r"1 of 61 answers break `format:`") as caught:
        dataset_builder.demonstrations(recipe(demonstrations=source), plain)
    assert caught.value.where.endswith("d.jsonl:61")
    assert "b b" in caught.value.given and "skip_bad: 1" in caught.value.remedy
    kept = dataset_builder.demonstrations(recipe(demonstrations={**source, "skip_bad": 1}), plain)
    assert removed(kept, "broken") == 1
    assert len(all_rows(kept)) == 60


def test_the_best_answer_of_a_ranking_has_the_form(tmp_path, chat):
    rows = [
        {"prompt": f"q{i}", "completions": ["b b", f"a{i}"], "ranks": [2, 1]} for i in range(60)
    ]
    source = {"path": str(jsonl(tmp_path / "d.jsonl", rows)), "format": {"max_words": 1}}
    assert len(all_rows(dataset_builder.demonstrations(recipe(demonstrations=source), chat))) == 60


@pytest.mark.parametrize(
    ("sets", "reason"),
    [
        ({"comparisons": {"path": "x.jsonl", "format": {"max_words": 1}}}, "demonstrations only"),
        (
            {"demonstrations": {"task": "closed-world", "format": {"max_words": 1}}},
            "format is read",
        ),
        ({"demonstrations": {"path": "x.jsonl", "format": {"bullets": 0}}}, "from 1"),
    ],
)
def test_a_format_that_nothing_reads_is_refused(sets, reason):
    with pytest.raises(ValidationError, match=reason):
        recipe(**sets)


def test_an_invalid_schema_in_a_recipe_is_a_data_error(tmp_path, plain):
    form = {"json_schema": {"type": "text"}}
    source = {"path": str(jsonl(tmp_path / "d.jsonl", ROWS)), "format": form}
    with pytest.raises(DataError, match="format: json_schema is invalid"):
        dataset_builder.demonstrations(recipe(demonstrations=source), plain)
