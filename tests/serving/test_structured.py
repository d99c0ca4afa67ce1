# SPDX-License-Identifier: Apache-2.0
"""Constraints: what they let through, their strict check, and hostile ones."""

import json
import random
import time

import numpy as np
import pytest
from transformers import AutoTokenizer

from lora_rlhf import tiny
from lora_rlhf.data import answer_format
from lora_rlhf.errors import UsageError
from lora_rlhf.serving.structured import Constraint


def closed(**properties):
    return {"type": "object", "properties": properties, "required": list(properties),
            "additionalProperties": False}  # fmt: skip


WORD = {"type": "string", "pattern": "^[a-z]{1,8}$"}
TREE = {"$defs": {"t": closed(name=WORD, sub={"type": "array", "items": {"$ref": "#/$defs/t"},
                                              "maxItems": 2})}, "$ref": "#/$defs/t"}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny.path())


def walk(constraint: Constraint, tokenizer, seed: int, most: int = 200) -> str | None:
    """Follow random tokens to the end of an answer; None if it does not end."""
    matcher = constraint.matcher(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    rng, ids = np.random.default_rng(seed), []
    for _ in range(most):
        allowed = np.flatnonzero(matcher.allowed())
        token = int(rng.choice(allowed))
        if matcher.valid and rng.random() < 0.3:
            token = tokenizer.eos_token_id
        if token == tokenizer.eos_token_id:
            break
        ids.append(token)
        matcher.consume(token)
        if matcher.complete:
            break
    else:
        return None
    return tokenizer.decode(ids)


@pytest.mark.parametrize(
    "constraint",
    [
        Constraint(
            "json_schema", closed(a=WORD, n={"type": "integer", "minimum": 0, "maximum": 99})
        ),
        Constraint("json_schema", closed(d={"type": "string", "format": "date"})),
        Constraint(
            "json_schema", {"type": "array", "items": {"enum": ["é", 1, None]}, "maxItems": 3}
        ),
        Constraint("json_schema", {"oneOf": [closed(kind={"const": k}, v=WORD) for k in "ab"]}),
        Constraint("json_schema", TREE),
        Constraint("json"),
        Constraint("regex", r"[A-Z][a-z]{2,5}( \d{1,3}){0,2}"),
        Constraint("choice", ["yes", "no", 'say "no"', "über"]),
        Constraint("grammar", 'start: "(" start ")" | /[0-9]{1,4}/'),
    ],
    ids=lambda one: one.kind,
)
def test_random_tokens_end_in_the_form(constraint, tokenizer):
    texts = [walk(constraint, tokenizer, seed) for seed in range(12)]
    whole = [text for text in texts if text is not None]
    assert len(whole) >= 3
    assert [constraint.check(text) for text in whole] == [None] * len(whole)


@pytest.mark.parametrize(
    ("kind", "value", "text"),
    [
        ("json", None, '{"a": "line\nbreak"}'),
        ("json", None, '{"a": 1, "a": 2}'),
        ("json", None, "[NaN]"),
        ("json", None, '"\\ud800"'),
        ("json", None, '{"a": 1} '[:-2]),
        ("json", None, "[" * 5000),
        ("json_schema", closed(n={"type": "integer"}), '{"n": "1"}'),
        ("json_schema", closed(n={"type": "integer"}), '{"n": 1, "m": 2}'),
        ("json_schema", {"patternProperties": {"^a": {}}, "additionalProperties": False},
         '{"b": 1}'),
        ("json_schema", {"patternProperties": {"^a": {"type": "null"}}}, '{"ab": 1}'),
        ("regex", "a+", "aab"),
        ("choice", ["a", "b"], "ab"),
        ("grammar", 'start: "a" "b"', "a"),
        ("grammar", 'start: "a" "b"', "abc"),
    ],
)  # fmt: skip
def test_texts_of_another_form(kind, value, text):
    assert Constraint(kind, value).check(text)


def doubled(keyword: str, inner: dict) -> dict:
    """A schema of one page that takes 2^40 steps."""
    defs = {f"a{i}": {keyword: [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(40)}
    return {"$defs": {**defs, "a40": inner}, "$ref": "#/$defs/a0"}


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("regex", "(.{0,200}a.{0,200}){20}"),
        ("regex", "((a{0,100}){0,100}){0,100}"),
        ("regex", "["),
        ("regex", r"(a)\1"), ("regex", "(?=a)b"), ("regex", "(.*[ab].{14}c|.*[de].{15}f){1,9}"),
        ("json_schema", {"$ref": "http://127.0.0.1:9/x.json"}), ("json_schema", {"$ref": "#/nope"}),
        ("json_schema", {"$ref": "#"}), ("json_schema", {"type": "nonsense"}),
        ("json_schema", {"not": {"type": "string"}}),
        ("json_schema", doubled("anyOf", {"type": "null"})),
        ("json_schema", {"type": "string", "minLength": 10**9}),
        ("json_schema", {"enum": [f"{i}" for i in range(5000)]}),
        ("json_schema", {"x-guidance": {"lenient": True}, "not": {}}),
        ("json_schema", {"enum": ["x" * 70_000]}),
        ("json_schema", 3),
        ("json_schema", {"enum": [{1}]}),
        ("choice", []),
        ("choice", "ab"),
        ("choice", [""]),
        ("regex", ""),
        ("xml", "a"),
        ("json", {}),
        ("grammar", "nonsense ("),
        ("grammar", "start: a\na: b\nb: a"),
        ("grammar", "start: @other"),
        ("grammar", "start: " + "(" * 3000 + '"a"' + ")" * 3000),
        ("grammar", 'start: x{1000000}\nx: "a"'),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_a_hostile_form_takes_a_bounded_time(kind, value, tokenizer):
    start = time.process_time()
    try:
        walk(Constraint(kind, value), tokenizer, 0, most=30)
    except UsageError as error:
        assert len(str(error)) < 1000
    assert time.process_time() - start < 3


def test_a_form_that_grows_too_large_is_an_error_and_no_end(tokenizer):
    with pytest.raises(UsageError, match="cannot be followed: .*too many"):
        walk(Constraint("regex", "(a{1000}){1000}"), tokenizer, 0)
    with pytest.raises(UsageError, match="cannot be used: look-around, .* is not supported"):
        Constraint("regex", "(?=a)b").matcher(tokenizer, len(tokenizer), [0])


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        (doubled("anyOf", {"type": "null"}), "1"),
        ({"type": "string", "pattern": "^(a|aa)+$"}, '"' + "a" * 60 + '!"'),
        ({"patternProperties": {"^(a|aa)+$": {}}, "additionalProperties": False},
         json.dumps({"a" * 60 + "!": 1})),
    ],
)  # fmt: skip
def test_a_check_ends_in_time(schema, text, monkeypatch):
    monkeypatch.setattr(answer_format, "_SECONDS", 0.05)
    start = time.process_time()
    assert "takes over 0.05 second" in Constraint("json_schema", schema).check(text)
    assert time.process_time() - start < 2


def test_no_state_is_shared(tokenizer):
    first = Constraint("choice", ["abc", "xyz"]).matcher(tokenizer, len(tokenizer), [1])
    second = first.copy()
    before = second.allowed().copy()
    first.consume(random.choice(np.flatnonzero(first.allowed()).tolist()))
    assert (second.allowed() == before).all()


@pytest.mark.parametrize(
    ("constraint", "least"),
    [
        (Constraint("json_schema", closed(a={"type": "string"}, b={"items": WORD})), 24),
        (Constraint("json_schema", TREE), 24),
        (Constraint("json_schema", closed(s={"type": "string", "minLength": 12})), 24),
        (Constraint("json_schema", closed(mail={"type": "string", "format": "email"})), 40),
        (Constraint("json"), 3),
        (Constraint("regex", "[a-z]{3,9}( [a-z]+)*"), 3),
        (Constraint("regex", "[0-9]{1,3}(,000)*"), 1),
        (Constraint("choice", ["a long answer of some words", "no"]), 12),
    ],
    ids=lambda one: getattr(one, "kind", one),
)  # fmt: skip
def test_an_answer_ends_in_its_form_before_it_is_cut(constraint, least, tokenizer):
    eos = tokenizer.eos_token_id
    for limit in (least, least + 1, least + 2, least + 9, least + 60):
        matcher = constraint.matcher(tokenizer, len(tokenizer), [eos])
        rng, ids = np.random.default_rng(limit), []
        while len(ids) < limit and not matcher.complete:
            token = int(rng.choice(np.flatnonzero(matcher.allowed())))
            ids.append(matcher.within(token, limit - len(ids)))
            matcher.consume(ids[-1])
            if ids[-1] == eos:
                break
        text = tokenizer.decode([i for i in ids if i != eos])
        assert constraint.check(text) is None, text
