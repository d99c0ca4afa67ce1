# SPDX-License-Identifier: Apache-2.0
"""Reading a recipe: one YAML file that states a whole run.

A key that is not in the classes of sections.py is an error with its line and a suggestion.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from lora_rlhf.errors import RecipeError
from lora_rlhf.redaction import hide

from .schema import Recipe
from .strict_yaml import Lines, dump_yaml, parse_yaml

_MAX_BYTES = 250_000
_SHOWN = 20  # problems in one error
_INDEX = re.compile("[0-9]{1,6}")


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read, check and return a recipe; `overrides` are `key.sub=value` strings (`--set`).

    Relative paths of data and of the model are resolved against the recipe's folder.

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
    """The same from text, called `name` in errors; data paths are relative to `folder`."""
    data, lines = parse_yaml(text, name)
    for override in overrides or []:
        _apply_override(data, lines, override)
    _anchor_paths(data, folder)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise _explain(error, name, lines) from None


def masked(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe as plain data; `***` stands for secrets."""
    out: dict[str, Any] = hide(recipe.model_dump(mode="json"))
    return out


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML; it loads back to an equal recipe, but for masked secrets."""
    return dump_yaml(masked(recipe))


def _apply_override(data: dict[str, Any], lines: Lines, override: str) -> None:
    key, sign, value = override.partition("=")
    if not sign or not key:
        raise RecipeError(
            f"--set {_short(override)!r}", expected="key=value, such as ppo.args.learning_rate=2e-5"
        )
    target: Any = data
    parts = _parts(key)
    for index, part in enumerate(parts[:-1]):
        if isinstance(target, dict) and target.get(str(part)) is None:
            target[str(part)] = {}
        try:
            target = target[part if isinstance(target, list) else str(part)]
        except (IndexError, TypeError, KeyError):
            reached = _short(".".join(map(str, parts[: index + 1])))
            raise RecipeError(f"--set {_short(override)}: there is no {reached}") from None
    parsed, _ = parse_yaml(f"value: {value}", f"--set {_short(key)}")
    try:
        target[parts[-1] if isinstance(target, list) else str(parts[-1])] = parsed["value"]
    except (IndexError, TypeError):
        told = f"--set {_short(override)}: there is no {_short(key)}"
        raise RecipeError(told) from None
    lines[tuple(parts)] = 0


def _anchor_paths(data: dict[str, Any], folder: Path | None) -> None:
    """Make paths of the recipe absolute, so that a run can start anywhere.

    A model's id is a path where it begins like one, or where that folder, with a model in it, is
    beside the recipe: transformers would look for it in the working directory. Without a folder
    only `~` is put back, as what a run wrote down has it.
    """
    model = data.get("model")
    if isinstance(model, dict) and isinstance(model.get("id"), str) and model["id"] != "tiny":
        model["id"] = _model_id(model["id"], folder)
    sections = data.get("data")
    for sources in sections.values() if isinstance(sections, dict) else ():
        for source in sources if isinstance(sources, list) else ():
            path = source.get("path") if isinstance(source, dict) else None
            if isinstance(path, str) and not path.startswith("data://"):
                source["path"] = _data_path(path, folder)


def _model_id(given: str, folder: Path | None) -> str:
    if "\0" in given:
        return given  # no path at all: whoever looks for it says so
    found = (folder or Path()) / os.path.expanduser(given)
    beside = folder is not None and os.path.isfile(found / "config.json")
    if given.startswith("~") or beside or (folder is not None and given.startswith(".")):
        return os.path.abspath(found)
    return given


def _data_path(given: str, folder: Path | None) -> str:
    if "\0" in given or (folder is None and not given.startswith("~")):
        return given
    try:
        return str(((folder or Path()) / os.path.expanduser(given)).resolve())
    except (OSError, RuntimeError):  # a name that is too long, or links in a circle
        return given


def _fields(model: type[BaseModel], at: tuple[str | int, ...]) -> Iterator[str]:
    """The keys allowed beside the one that `at` names."""
    for part in at:
        if isinstance(part, int):
            continue
        annotation: Any = (
            model.model_fields[part].annotation if part in model.model_fields else None
        )
        if annotation is not None and getattr(annotation, "__args__", None):
            annotation = annotation.__args__[0]
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return
        model = annotation
    yield from model.model_fields


def _meant(at: tuple[str | int, ...]) -> str:
    """The key that an unknown one looks like; empty where there is none."""
    close = difflib.get_close_matches(str(at[-1]), list(_fields(Recipe, at[:-1])), n=1)
    return close[0] if close else ""


def _explain(error: ValidationError, name: str, lines: Lines) -> RecipeError:
    items: list[dict[str, Any]] = [dict(item) for item in error.errors(include_url=False)]
    unknown = [item["loc"] for item in items if item["type"] == "extra_forbidden"]
    meant = {(*at[:-1], _meant(at)) for at in unknown}  # one typo is one problem: it is not missing
    problems = [
        _problem(item, name, lines)
        for item in items
        if not (item["type"] == "missing" and item["loc"] in meant)
    ]
    where, first = problems[0]
    more = "".join(f"\n  {place}: {text}" for place, text in problems[1:_SHOWN])
    if len(problems) > _SHOWN:
        more += f"\n  and {len(problems) - _SHOWN} more"
    return RecipeError(
        first + more, where=where, remedy="correct the recipe; docs/recipes.md lists the keys"
    )


def _problem(item: dict[str, Any], name: str, lines: Lines) -> tuple[str, str]:
    """Where one of pydantic's errors stands in the recipe, and what it says."""
    at: tuple[str | int, ...] = tuple(item["loc"])
    if item["type"] == "conflict":  # of several keys; told where the first that was given stands
        named = [(*at, *_parts(key)) for key in item["ctx"]["keys"]]
        at = next((keys for keys in named if keys in lines), at)
    known = at
    while known and known not in lines:
        known = known[:-1]
    key = _short(".".join(map(str, at))) or "the recipe"
    line = lines.get(known, 1)
    where = f"{name}:{line}" if line else f"--set {key}"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "conflict":
        listed = any(isinstance(part, int) for part in at) and key not in message
        return where, f"{key}: {message}" if listed else message
    if item["type"] == "extra_forbidden":
        known_keys = ", ".join(_fields(Recipe, at[:-1]))
        hint = f"did you mean {close!r}?" if (close := _meant(at)) else f"known: {known_keys}"
        return where, f"unknown key {key!r}; {hint}"
    if item["type"] == "missing":
        return where, f"{key!r} is required"
    found = item.get("input")
    shown = (
        "a mapping"
        if isinstance(found, dict)
        else f"{hide(found, str(at[-1]) if at else '')!r:.80}"
    )
    return where, f"{key} = {shown}: {message}"


def _short(text: str) -> str:
    """What somebody wrote, short enough for an error, and on one line."""
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= 100 else text[:99] + "…"


def _parts(key: str) -> list[str | int]:
    parts = key.strip().split(".")
    return [int(part) if _INDEX.fullmatch(part) else part for part in parts]
