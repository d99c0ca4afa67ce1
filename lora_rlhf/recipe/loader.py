# SPDX-License-Identifier: Apache-2.0
"""Load and dump recipes: YAML, `--set` overrides, and errors with lines and suggestions."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from lora_rlhf.errors import RecipeError
from lora_rlhf.redaction import hide

from .schema import Recipe
from .strict_yaml import Key, Lines, dump_yaml, parse_yaml

_MAX_BYTES = 250_000
_MAX_PROBLEMS = 20
_INDEX = re.compile("[0-9]{1,6}")


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Load and check a recipe; `overrides` are `key.sub=value` strings (`--set`).

    Relative paths of data and model are resolved against the recipe's folder.

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
    if path.stat().st_size > _MAX_BYTES:
        raise RecipeError(f"{path} has over {_MAX_BYTES} bytes", expected="a recipe of a few kB")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{path} is not UTF-8 ({error.reason})", remedy="save it as UTF-8"
        ) from error
    return parse_recipe(text, str(path), overrides, folder=path.resolve().parent)


def parse_recipe(
    text: str, name: str, overrides: list[str] | None = None, folder: Path | None = None
) -> Recipe:
    """Parse a recipe's text, named `name` in errors; paths are relative to `folder`.

    Without a folder only `~` is expanded, because a run writes its home directory as `~`.
    """
    data, lines = parse_yaml(text, name)
    for override in overrides or []:
        _apply_override(data, lines, override)
    try:
        return Recipe.model_validate(data, context={"folder": folder})
    except ValidationError as error:
        raise _recipe_error(error, name, lines) from None


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


def _siblings(at: tuple[Key, ...]) -> list[str]:
    """Return the schema's keys in the section of `at`."""
    model: type[BaseModel] = Recipe
    for part in at[:-1]:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part)
        annotation: Any = field.annotation if field else None
        annotation = next(iter(get_args(annotation)), annotation)
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)


def _closest(at: tuple[Key, ...]) -> str:
    """Return the schema's key that resembles an unknown one; empty if there is none."""
    return (difflib.get_close_matches(str(at[-1]), _siblings(at), n=1) or [""])[0]


def _recipe_error(error: ValidationError, name: str, lines: Lines) -> RecipeError:
    items: list[dict[str, Any]] = [dict(item) for item in error.errors(include_url=False)]
    unknown = [item["loc"] for item in items if item["type"] == "extra_forbidden"]
    misspelt = {(*at[:-1], _closest(at)) for at in unknown}  # reported once, not as missing too
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
    line = lines.get(known, 1)
    where = f"{name}:{line}" if line else f"--set {key}"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "conflict":
        in_list = any(isinstance(part, int) for part in at) and key not in message
        return where, f"{key}: {message}" if in_list else message
    if item["type"] == "extra_forbidden":
        close = _closest(at)
        hint = f"did you mean {close!r}?" if close else f"known: {', '.join(_siblings(at))}"
        return where, f"unknown key {key!r}; {hint}"
    if item["type"] == "missing":
        return where, f"{key!r} is required"
    value = item.get("input")
    shown = f"{hide(value, str(at[-1]) if at else '')!r:.80}"
    return where, f"{key} = {'a mapping' if isinstance(value, dict) else shown}: {message}"


def _short(text: str) -> str:
    """Return user input on one line and short enough for an error."""
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= 100 else text[:99] + "…"


def _parts(key: str) -> list[Key]:
    parts = key.strip().split(".")
    return [int(part) if _INDEX.fullmatch(part) else part for part in parts]
