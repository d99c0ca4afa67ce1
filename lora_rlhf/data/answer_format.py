# SPDX-License-Identifier: Apache-2.0
"""Checks of an answer's form: a JSON schema, bullets, a number of words, a regular expression.

`format:` of a set of demonstrations and the labeling page check with the same functions.
"""

from __future__ import annotations

import functools
import json
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import regex  # type: ignore[import-untyped]  # unlike `re`, it can stop after a time

from lora_rlhf import extras
from lora_rlhf.errors import counted

from .sources import excerpt

CHECKS = ("json_schema", "bullets", "max_words", "regex")
"""Keys of `format:` and of a task's `checks`; all that are given must hold."""

_BULLETS = ("- ", "* ", "• ")
_SECONDS = 1.0  # for a regular expression; some need exponential time
_CLOCK = threading.local()
_USER, _EXTRA = "format: {json_schema: ...}", "hygiene"


def validate(checks: Mapping[str, Any]) -> None:
    """Check that the checks themselves can be carried out.

    Raises:
        ValueError: A key is unknown or has a wrong type, the schema or the expression is invalid.
        SetupError: A JSON schema, without the package jsonschema.
    """
    if unknown := [key for key in checks if key not in CHECKS]:
        raise ValueError(f"unknown key {unknown[0]!r}; known: {', '.join(CHECKS)}")
    words, bullets = checks.get("max_words"), checks.get("bullets")
    if words is not None and (type(words) is not int or words < 1):
        raise ValueError(f"max_words is {excerpt(words)}, not a number of words from 1")
    if (
        bullets is not None
        and type(bullets) is not bool
        and (type(bullets) is not int or bullets < 1)
    ):
        raise ValueError(f"bullets is {excerpt(bullets)}, not true or a number of bullets from 1")
    if (pattern := checks.get("regex")) is not None:
        try:
            regex.compile(pattern)
        except (regex.error, TypeError) as error:
            raise ValueError(f"regex is invalid: {error}: {excerpt(pattern)}") from None
    if (schema := checks.get("json_schema")) is not None:
        _validator(schema)


def problems(text: str, checks: Mapping[str, Any]) -> list[str]:
    """Return one sentence for each check that the answer breaks; empty if it is right.

    Args:
        text: The answer.
        checks: `json_schema`: the whole answer is JSON that the schema allows. `bullets`: every
            line begins with a bullet or continues one by an indent; a number demands so many.
            `max_words`: at most so many words. `regex`: it matches the whole answer.

    Raises:
        ValueError, SetupError: As from `validate`.
    """
    wrong: list[str] = []
    if (schema := checks.get("json_schema")) is not None:
        wrong += _json_problems(text, schema)
    if bullets := checks.get("bullets"):
        wrong += _bullet_problems(text, bullets)
    most, words = checks.get("max_words"), len(text.split())
    if most is not None and words > most:
        wrong.append(f"{counted(words, 'word')}, at most {most} are allowed")
    if (pattern := checks.get("regex")) is not None:
        try:
            if not regex.fullmatch(pattern, text, timeout=_SECONDS):
                wrong.append(f"the answer does not match {excerpt(pattern)}")
        except TimeoutError:
            wrong.append(f"matching {excerpt(pattern)} takes over {_SECONDS:g} second")
    return wrong


def _bullet_problems(text: str, bullets: int) -> list[str]:
    count = 0
    for number, line in enumerate(text.splitlines(), start=1):
        if line.lstrip().startswith(_BULLETS):
            count += 1
        elif line.strip() and not (count and line[0].isspace()):
            return [f"line {number} does not begin with '- ': {excerpt(line, 40)}"]
    if bullets is not True and count != bullets:
        return [f"{count} bullets instead of {bullets}"]
    return [] if count else ["no line begins with '- '"]


def _json_problems(text: str, schema: Any) -> list[str]:
    validator, references = _validator(schema), _load("referencing.exceptions")
    try:
        value = json.loads(text, parse_constant=_no_constant)
        _CLOCK.end = time.monotonic() + _SECONDS
        errors = sorted(validator.iter_errors(value), key=lambda error: error.json_path)
    except json.JSONDecodeError as error:
        return [f"not JSON: {error.msg} at line {error.lineno}, column {error.colno}"]
    except (ValueError, RecursionError) as error:
        return [f"not JSON: {excerpt(str(error))}"]
    except TimeoutError:
        return [f"checking by the JSON schema takes over {_SECONDS:g} second"]
    except references.Unresolvable as error:
        raise ValueError(f"json_schema refers to {error.ref!r}, which it does not hold") from None
    return [f"JSON at {error.json_path}: {excerpt(error.message, 120)}" for error in errors[:3]]


def _validator(schema: Any) -> Any:
    """Return a validator for a JSON schema; its registry is empty, so that no `$ref` is fetched."""
    jsonschema, referencing = _load("jsonschema"), _load("referencing")
    if not isinstance(schema, dict | bool):
        raise ValueError(f"json_schema is {excerpt(schema)}, not a JSON schema")
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ValueError(f"json_schema is invalid at {error.json_path}: {error.message}") from None
    return _bounded(kind)(schema, registry=referencing.Registry())


@functools.cache
def _bounded(kind: Any) -> Any:
    """Return a validator class that raises TimeoutError at `_CLOCK.end`.

    A schema of one line can need 2^40 steps, and `re`, which jsonschema uses, cannot be stopped.
    """

    def timed(keyword: Callable[..., Any]) -> Callable[..., Any]:
        def check(*args: Any) -> Any:
            _left()
            return keyword(*args)

        return check

    wrong = _load("jsonschema").ValidationError
    known = kind.VALIDATORS
    more = known.get("additionalProperties")

    def pattern(_: Any, expression: str, instance: Any, __: Any) -> Any:
        if isinstance(instance, str) and not _finds(expression, instance):
            yield wrong(f"{instance!r} does not match {expression!r}")

    def pattern_properties(validator: Any, patterns: Any, instance: Any, _: Any) -> Any:
        for expression, inner in patterns.items() if isinstance(instance, dict) else ():
            for key, value in instance.items():
                if _finds(expression, key):
                    yield from validator.descend(value, inner, path=key, schema_path=expression)

    def additional(validator: Any, allowed: Any, instance: Any, schema: Any) -> Any:
        if "patternProperties" in schema and isinstance(instance, dict):
            patterns = schema["patternProperties"]
            named = {k for k in instance if any(_finds(each, k) for each in patterns)}
            instance = {key: instance[key] for key in instance.keys() - named}
            schema = {k: v for k, v in schema.items() if k != "patternProperties"}
        return more(validator, allowed, instance, schema)

    own = {"pattern": pattern, "patternProperties": pattern_properties,
           "additionalProperties": additional}  # fmt: skip
    calls = {name: timed(own.get(name, call)) for name, call in known.items()}
    return _load("jsonschema").validators.extend(kind, calls)


def _left() -> float:
    left: float = _CLOCK.end - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _finds(expression: str, text: str) -> bool:
    try:
        return regex.search(expression, text, timeout=_left()) is not None
    except regex.error as error:
        raise ValueError(f"pattern is invalid: {error}: {excerpt(expression)}") from None


def _load(module: str) -> Any:
    return extras.load(module, _USER, _EXTRA)


def _no_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
