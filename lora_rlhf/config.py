# SPDX-License-Identifier: Apache-2.0
"""Reading a recipe: one YAML file that states a whole run.

A key that is not in the classes of sections.py is an error with its line and a suggestion.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from .errors import RecipeError
from .sections import Recipe
from .strict_yaml import Lines, parse_yaml

__all__ = ["Recipe", "dump_recipe", "load_recipe", "masked", "parse_recipe"]

_SECRET = re.compile(r"token|secret|password|api_key", re.IGNORECASE)
_NOT_SECRET = re.compile(r"_?tokens?_|_tokens?$|^tokens$|tokenizer", re.IGNORECASE)
_MAX_BYTES = 1_000_000


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read, check and return a recipe; `overrides` are `key.sub=value` strings (`--set`).

    Relative data paths are resolved against the recipe's folder.

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
    if folder is not None:
        _anchor_paths(data, folder)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise _explain(error, name, lines) from None


def masked(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe as plain data, with values of secret-like keys replaced by `***`."""

    def mask(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {k: mask(v, str(k)) for k, v in value.items()}
        if isinstance(value, list):
            return [mask(v, key) for v in value]
        secret = isinstance(value, str) and _SECRET.search(key) and not _NOT_SECRET.search(key)
        return "***" if secret or (isinstance(value, str) and value.startswith("hf_")) else value

    out: dict[str, Any] = mask(recipe.model_dump(mode="json"))
    return out


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, secrets masked; it loads back to an equal recipe."""
    return yaml.safe_dump(masked(recipe), sort_keys=False, allow_unicode=True)


def _apply_override(data: dict[str, Any], lines: Lines, override: str) -> None:
    key, sign, value = override.partition("=")
    if not sign or not key:
        raise RecipeError(
            f"--set {override!r}", expected="key=value, such as ppo.args.learning_rate=2e-5"
        )
    target: Any = data
    parts: list[str | int] = [int(p) if p.isdigit() else p for p in key.strip().split(".")]
    for index, part in enumerate(parts[:-1]):
        if isinstance(target, dict) and target.get(str(part)) is None:
            target[str(part)] = {}
        try:
            target = target[part if isinstance(target, list) else str(part)]
        except (IndexError, TypeError, KeyError):
            reached = ".".join(map(str, parts[: index + 1]))
            raise RecipeError(f"--set {override!r}: there is no {reached}") from None
    parsed, _ = parse_yaml(f"value: {value}", f"--set {key}")
    try:
        target[parts[-1] if isinstance(target, list) else str(parts[-1])] = parsed["value"]
    except (IndexError, TypeError):
        raise RecipeError(f"--set {override!r}: there is no {key}") from None
    lines[tuple(parts)] = 0


def _anchor_paths(data: dict[str, Any], folder: Path) -> None:
    """Make `./x` and file paths of the recipe absolute, so that a run can start anywhere."""
    model = data.get("model")
    if isinstance(model, dict) and isinstance(model.get("id"), str) and model["id"].startswith("."):
        model["id"] = str((folder / model["id"]).resolve())
    sections = data.get("data")
    for sources in sections.values() if isinstance(sections, dict) else ():
        for source in sources if isinstance(sources, list) else ():
            path = source.get("path") if isinstance(source, dict) else None
            if isinstance(path, str) and not path.startswith("data://"):
                source["path"] = str((folder / path).resolve())


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


def _explain(error: ValidationError, name: str, lines: Lines) -> RecipeError:
    problems = []
    for item in error.errors():
        at = tuple(item["loc"])
        key = ".".join(map(str, at)) or "the recipe"
        known = at
        while known and known not in lines:
            known = known[:-1]
        line = lines.get(known, 1)
        where = f"{name}:{line}" if line else f"--set {key}"
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            allowed = list(_fields(Recipe, at[:-1]))
            close = difflib.get_close_matches(str(at[-1]), allowed, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(allowed)}"
            message = f"unknown key {key!r}; {hint}"
        elif item["type"] == "missing":
            message = f"{key!r} is required"
        else:
            message = f"{key} = {item.get('input')!r:.80}: {message}"
        problems.append((where, message))
    where, first = problems[0]
    more = "".join(f"\n  {place}: {text}" for place, text in problems[1:])
    return RecipeError(
        first + more, where=where, remedy="correct the recipe; docs/recipes.md lists the keys"
    )
