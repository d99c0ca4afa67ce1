# SPDX-License-Identifier: Apache-2.0
"""The form of an answer: what each check refuses, and checks that are wrong themselves."""

import pytest

from lora_rlhf import extras
from lora_rlhf.data.answer_format import problems, validate
from lora_rlhf.errors import SetupError

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
