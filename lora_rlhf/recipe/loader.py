# SPDX-License-Identifier: Apache-2.0
"""Load and dump recipes: YAML, `--set` overrides, and errors with lines and suggestions."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from lora_rlhf.errors import LoraRlhfError, RecipeError, UsageError, first_line, reason
from lora_rlhf.redaction import hide

from . import suggestions, trl_args
from .schema import Recipe, Section
from .stage_keys import ALGORITHMS
from .strict_yaml import Key, Lines, dump_yaml, parse_yaml

S = TypeVar("S", bound=Section)

_MAX_BYTES = 250_000
_MAX_PROBLEMS = 20
_DATA = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".gz")
_INDEX = re.compile("[0-9]{1,6}")


def load_recipe(
    path: str | Path, overrides: Overrides | None = None, *, until: str | None = None
) -> Recipe:
    """Load and check a recipe; `overrides` are `key.sub=value` strings (`--set`).

    Relative paths of data and model are resolved against the recipe's folder. With `until`, the
    last stage that is asked for, contradictions that only later stages meet are allowed.

    Raises:
        RecipeError: With file, line, the wrong key or value, and a suggestion.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "recipe.yaml"
    if not path.is_file():
        raise RecipeError(
            f"there is no recipe at {path}",
            expected="a YAML file, or a folder that holds recipe.yaml",
            remedy="check the path; `lora-rlhf demo` needs no recipe",
        )
    if path.suffix.lower() in _DATA:
        raise RecipeError(
            f"{path} is data, not a recipe",
            expected="a YAML file that names it under data:",
            remedy=f"write one: `lora-rlhf init {shlex.quote(str(path))}`",
        )
    if path.stat().st_size > _MAX_BYTES:
        raise RecipeError(f"{path} has over {_MAX_BYTES} bytes", expected="a recipe of a few kB")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{path} is not UTF-8 ({error.reason})", remedy="save it as UTF-8"
        ) from error
    if not text.strip("\0\n ") and (copy := path.with_name(f"{path.name}.bak")).is_file():
        raise RecipeError(f"{path} is empty, as after a power cut", remedy=f"use its backup {copy}")
    return parse_recipe(text, str(path), overrides, path.resolve().parent, until)


Overrides = str | Sequence[str] | Mapping[str, Any]
"""Changes of a recipe: `key=value`, several of these, or keys and values."""


def check_recipe(recipe: object) -> None:
    """Refuse anything but a recipe, such as its path.

    Raises:
        UsageError: It is none.
    """
    if not isinstance(recipe, Recipe):
        raise UsageError(
            f"{recipe!r:.80} is no recipe, but of the type {type(recipe).__name__}",
            expected="a recipe, as `lora_rlhf.load_recipe(PATH)` returns it",
        )


def parse_recipe(
    text: str,
    name: str,
    overrides: Overrides | None = None,
    folder: Path | None = None,
    until: str | None = None,
) -> Recipe:
    """Parse a recipe's text, named `name` in errors; paths are relative to `folder`.

    Without a folder only `~` is expanded, because a run writes its home directory as `~`.

    Args:
        until: The last stage that is asked for; contradictions between keys that only later stages
            read are allowed then. "": all contradictions, as in a recipe that a run has written.
    """
    data, lines = parse_yaml(text, name)
    if isinstance(overrides, Mapping):
        # JSON is YAML: None becomes null, and text in quotes stays text.
        given = overrides.items()
        overrides = [f"{key}={json.dumps(value, default=str)}" for key, value in given]
    for override in [overrides] if isinstance(overrides, str) else overrides or []:
        _apply_override(data, lines, override)
    try:
        return Recipe.model_validate(data, context={"folder": folder})
    except ValidationError as error:
        if until is None or not all(_is_unused(dict(item), until) for item in error.errors()):
            raise _recipe_error(error, name, lines) from None
    return Recipe.model_validate(data, context={"folder": folder, "without_rules": True})


_READERS = {
    **dict.fromkeys(("model", "lora", "data", "checkpoint", "sft"), "sft"),
    "reward": "reward", "evaluate": "evaluate", "hub": "card",
}  # fmt: skip
"""Section -> the first stage that reads it; the others are read by the policy's stage."""


def _is_unused(item: dict[str, Any], until: str) -> bool:
    """Tell if an error is a contradiction with a key that no stage up to `until` reads."""
    if item["type"] != "conflict":
        return False
    order = ("", "sft", "reward", "policy", "evaluate", "card")
    sections = {str((*item["loc"], *_parts(key))[0]) for key in item["ctx"]["keys"]}
    first = max(order.index(_READERS.get(section, "policy")) for section in sections)
    return first > order.index(until if until in order else "policy")


def load_section(model: type[S], path: Path, remedy: str) -> S:
    """Load another YAML file with a schema, such as a suite.

    Raises:
        UsageError: It cannot be read, or a key or value is wrong, with file and line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the file cannot be read: {reason(error)}", where=str(path)) from error
    data, lines = parse_yaml(text, str(path))
    try:
        return model.model_validate(data)
    except ValidationError as error:
        items = error.errors(include_url=False)  # a misspelt key is also missing as its right one
        item = min(items, key=lambda item: item["type"] != "extra_forbidden")
        at = known = item["loc"]
        if item["type"] == "conflict":  # its message names the key
            known = (*at, *_parts(next(iter(item["ctx"]["keys"]), "")))
        while known and known not in lines:
            known = known[:-1]
        key = "".join(f"{part}." for part in at)[:-1] + ": " * bool(at)
        unknown = item["type"] == "extra_forbidden"
        message = "is not a known key" if unknown else first_line(Exception(item["msg"]))
        raise UsageError(
            f"{key}{message}", where=f"{path}:{lines.get(known, 1)}", remedy=remedy
        ) from None


def located(
    error: LoraRlhfError, path: Path, overrides: Sequence[str] | None = None
) -> LoraRlhfError:
    """Return an error about a key with its file and line, which checks of a loaded recipe lack."""
    named = re.match(r"[a-z_]+(?:\.\w+)+", error.given)
    if error.where or named is None or not isinstance(error, RecipeError):
        return error
    at: tuple[Key, ...] = tuple(_parts(named[0]))
    if any(tuple(_parts(one.partition("=")[0])) == at for one in overrides or ()):
        where = f"--set {named[0]}"
    else:
        file = path / "recipe.yaml" if path.is_dir() else path
        _, lines = parse_yaml(file.read_text(encoding="utf-8-sig"), str(file))
        if at not in lines:
            return error
        where = f"{file}:{lines[at]}"
    return type(error)(error.given, expected=error.expected, remedy=error.remedy, where=where)


@contextlib.contextmanager
def locating(path: Path, overrides: Sequence[str] | None = None) -> Iterator[None]:
    """Raise errors about keys of this recipe with their place."""
    try:
        yield
    except RecipeError as error:
        raise located(error, path, overrides) from error


def dump_recipe(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML, which loads back as an equal recipe except secrets."""
    return dump_yaml(hide(recipe.model_dump(mode="json")))


def _apply_override(data: dict[str, Any], lines: Lines, override: str) -> None:
    key, sign, value = override.partition("=")
    if not sign or not key:
        raise RecipeError(
            f"--set {_short(override)!r}", expected="key=value, such as ppo.args.learning_rate=2e-5"
        )
    parts = _parts(key)
    parsed, _ = parse_yaml(f"value: {value}", f"--set {_short(key)}")
    target: Any = data
    for index, part in enumerate(parts):
        here = part if isinstance(target, list) else str(part)
        try:
            if index == len(parts) - 1:
                target[here] = parsed["value"]
            else:
                if isinstance(target, dict) and target.get(here) is None:
                    target[here] = {}
                target = target[here]
        except (IndexError, TypeError, KeyError):
            reached = _short(".".join(map(str, parts[: index + 1])))
            raise RecipeError(f"--set {_short(override)}: there is no {reached}") from None
    lines[tuple(parts)] = 0


def _recipe_error(error: ValidationError, name: str, lines: Lines) -> RecipeError:
    items: list[dict[str, Any]] = [dict(item) for item in error.errors(include_url=False)]
    args = trl_args.usable()
    unknown = [item["loc"] for item in items if item["type"] == "extra_forbidden"]
    misspelt = {
        key for at in unknown for key in suggestions.suggest(at, args)
    }  # not missing as well
    problems = [
        _problem(item, name, lines)
        for item in items
        if not (item["type"] == "missing" and item["loc"] in misspelt)
    ]
    where, first = problems[0]
    more = "".join(f"\n  {place}: {text}" for place, text in problems[1:_MAX_PROBLEMS])
    if len(problems) > _MAX_PROBLEMS:
        more += f"\n  and {len(problems) - _MAX_PROBLEMS} more"
    return RecipeError(
        first + more, where=where, remedy="correct the recipe; docs/recipes.md lists the keys"
    )


def _problem(item: dict[str, Any], name: str, lines: Lines) -> tuple[str, str]:
    """Return the file and line, and the message, of one of pydantic's errors."""
    at: tuple[Key, ...] = tuple(item["loc"])
    if item["type"] == "conflict":  # shown at the first of its keys that the recipe has
        keys = [(*at, *_parts(key)) for key in item["ctx"]["keys"]]
        at = next((key for key in keys if key in lines), at)
    known = at
    while known and known not in lines:
        known = known[:-1]
    key = _short(".".join(map(str, at))) or "the recipe"
    line = next((n for k, n in lines.items() if k[: len(at)] == at), lines.get(known, 1))
    where = f"{name}:{line}" if line else f"--set {key}"
    message = _plain(item)
    if item["type"] == "conflict":
        in_list = any(isinstance(part, int) for part in at) and key not in message
        return where, f"{key}: {message}" if in_list else message
    if item["type"] == "extra_forbidden" and at[-1] == "privacy" and at[0] in ALGORITHMS:
        return where, f"unknown key {key!r}; {_NOT_PRIVATE}"
    if item["type"] == "extra_forbidden":
        hint = (
            suggestions.described(at, trl_args.usable())
            or f"known: {', '.join(suggestions.siblings(at))}"
        )
        return where, f"unknown key {key!r}; {hint}"
    if item["type"] == "missing":
        return where, f"{key!r} is required"
    value = item.get("input")
    shown = f"{hide(value, str(at[-1]) if at else '')!r:.80}"
    if item["type"] == "string_type" and isinstance(value, int | float):
        message += f': in quotes, such as {at[-1]}: "..."'  # such as a commit or a date
    if item["type"] == "list_type" and at[:1] == ("data",) and len(at) == 2:
        message = "expected a list of sources, such as [{path: FILE}]"
    if item["type"] == "model_type" and at[:1] == ("data",) and isinstance(value, str):
        message = "expected a source, such as {path: FILE}"
    if item["type"] == "model_type" and at == ("model",):
        message = "expected keys and values, such as {id: tiny}"
    return where, f"{key} = {'a mapping' if isinstance(value, dict) else shown}: {message}"


_NOT_PRIVATE = (
    "there is no private training of the policy: each of its rollouts depends on all earlier ones, "
    "so its updates cannot be split into examples with bounded weight. Set sft.privacy and "
    "reward.privacy: what the policy learns from those adapters stays protected; its prompts do not"
)

_EXPECTED = {
    "int_type": "a whole number", "int_from_float": "a whole number", "float_type": "a number",
    "finite_number": "a finite number", "bool_type": "true or false", "string_type": "text",
    "list_type": "a list, such as [a, b]", "model_type": "keys and values, such as {{key: value}}",
    "model_attributes_type": "keys and values, such as {{key: value}}",
    "dict_type": "keys and values, such as {{key: value}}", "literal_error": "{expected}",
    "greater_than": "a number above {gt:g}", "greater_than_equal": "{ge:g} or more",
    "less_than": "a number below {lt:g}", "less_than_equal": "{le:g} or less",
    "string_pattern_mismatch": "letters, digits, '.', '_' or '-', the first a letter or digit",
    "int_parsing_size": "a smaller number",
}  # fmt: skip
"""Type of a pydantic error -> the value that would be right, in the words of a recipe."""


def _plain(item: dict[str, Any]) -> str:
    """Return the message of one of pydantic's errors in the words of a recipe."""
    if (expected := _EXPECTED.get(item["type"])) is None:
        return str(item["msg"]).removeprefix("Value error, ")
    return "expected " + expected.format(**item.get("ctx", {}))


def _short(text: str) -> str:
    """Return user input on one line and short enough for an error."""
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= 100 else text[:99] + "…"


def _parts(key: str) -> list[Key]:
    parts = key.strip().split(".")
    return [int(part) if _INDEX.fullmatch(part) else part for part in parts]
