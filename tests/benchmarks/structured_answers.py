# SPDX-License-Identifier: Apache-2.0
"""Counts answers to 20 JSON schemas that a strict parser takes; the cost of a constraint a token.

python tests/benchmarks/structured_answers.py [MODEL] [ANSWERS]; docs/use.md has the numbers.
"""

import dataclasses
import json
import statistics
import sys
import time

import jsonschema

from lora_rlhf.serving.inference import InferenceEngine, Request
from lora_rlhf.serving.structured import Constraint


def closed(**properties):
    return {"type": "object", "properties": properties, "required": list(properties),
            "additionalProperties": False}  # fmt: skip


TEXT, WORD, INT, FLAG = (
    {"type": "string"},
    {"type": "string", "maxLength": 12},
    {"type": "integer"},
    {"type": "boolean"},
)
_TREE = closed(name=WORD, sub={"type": "array", "items": {"$ref": "#/$defs/t"}, "maxItems": 2})
SCHEMAS = [
    closed(name=WORD), closed(name=TEXT, age={**INT, "minimum": 0, "maximum": 130}),
    closed(ok=FLAG, why={"type": ["string", "null"], "maxLength": 20}),
    closed(label={"enum": ["positive", "neutral", "negative"]},
           score={"type": "number", "minimum": 0, "maximum": 1}),
    closed(tags={"type": "array", "items": WORD, "minItems": 1, "maxItems": 4}),
    closed(day={"type": "string", "format": "date"}, time={"type": "string", "format": "time"}),
    closed(id={"type": "string", "format": "uuid"}),
    closed(mail={"type": "string", "format": "email"}),
    closed(code={"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
           count={**INT, "minimum": -5, "maximum": 5}),
    closed(person=closed(first=WORD, last=WORD), city=WORD),
    closed(points={"type": "array", "maxItems": 3,
                   "items": closed(x={"type": "number"}, y={"type": "number"})}),
    {"type": "array", "items": {"enum": ["red", "green", 1, None, True]}, "minItems": 2,
     "maxItems": 5},
    {"anyOf": [closed(error=WORD), closed(result=INT)]},
    {"oneOf": [closed(kind={"const": "a"}, v=WORD), closed(kind={"const": "b"}, v=INT)]},
    {"$defs": {"t": _TREE}, "$ref": "#/$defs/t"},
    {**closed(a=WORD, b=INT), "required": ["a"]},
    {"type": "object", "additionalProperties": INT, "maxProperties": 3},
    {"type": "array", "prefixItems": [WORD, INT, FLAG], "items": False, "minItems": 3},
    {"type": "string", "minLength": 3, "maxLength": 30}, {"type": ["number", "boolean", "null"]},
]  # fmt: skip


def whole(text: str, schema) -> bool:
    """Parse strictly: RFC 8259, no equal keys, no half of a surrogate pair; then the schema."""

    def pairs(items):
        assert len(dict(items)) == len(items), "equal keys"
        return dict(items)

    try:
        value = json.loads(text, object_pairs_hook=pairs, parse_constant=lambda _: 1 / 0)
        json.dumps(value, ensure_ascii=False).encode()
        jsonschema.Draft202012Validator(schema).validate(value)
    except Exception:
        return False
    return True


def count(engine: InferenceEngine, answers: int) -> None:
    turns = ({"role": "user", "content": "Answer in JSON: what is in the box?"},)
    each, right, cut, tokens, start = answers // len(SCHEMAS), 0, 0, 0, time.process_time()
    for number, schema in enumerate(SCHEMAS):
        for seed in range(0, each, 50):
            done = engine.generate(
                Request(turns, n=min(50, each - seed), seed=seed, max_tokens=96,
                        constraint=Constraint("json_schema", schema))
            )  # fmt: skip
            right += sum(whole(c.text, schema) and c.valid is True for c in done.choices)
            cut += sum(c.finish_reason == "length" for c in done.choices)
            tokens += done.completion_tokens
        print(
            f"schema {number}: {right} of {each * (number + 1)} valid, {cut} ended early",
            flush=True,
        )
    spent = time.process_time() - start
    print(f"{right} of {each * len(SCHEMAS)} valid; {tokens} tokens, {spent:.0f} CPU seconds")


def slowdown(engine: InferenceEngine, pairs: int = 8, tokens: int = 64) -> None:
    """CPU seconds a token with and without a constraint that never ends an answer, in pairs."""
    turns = ({"role": "user", "content": "Count."},)
    anything = Constraint("regex", "(.|\n){1000,}")
    array = Constraint("json_schema", {"type": "array", "items": WORD, "minItems": 1000})
    for name, constraint in (("regex", anything), ("json_schema", array)):
        ratios, free = [], []
        for seed in range(pairs):
            spent = []
            for one in (None, constraint):
                start = time.process_time()
                asked = Request(turns, max_tokens=tokens, seed=seed, temperature=3.0, whole=False)
                done = engine.generate(dataclasses.replace(asked, constraint=one))
                spent.append((time.process_time() - start) / done.completion_tokens)
            ratios.append(spent[1] / spent[0])
            free.append(spent[0])
        alone, ratio = 1000 * statistics.median(free), statistics.median(ratios)
        print(f"{name}: {alone:.2f} ms a token without, x {ratio:.2f} with ({pairs} pairs)")


if __name__ == "__main__":
    made = InferenceEngine.load([sys.argv[1] if len(sys.argv) > 1 else "tiny"])
    slowdown(made)
    count(made, int(sys.argv[2]) if len(sys.argv) > 2 else 10_000)
    made.close()
