# SPDX-License-Identifier: Apache-2.0
"""YAML as data: no tags, aliases or duplicates; `1e-4` is a number; every key has its line."""

from __future__ import annotations

import re
from typing import Any

import yaml

from .errors import RecipeError


class _Loader(yaml.SafeLoader):
    """Safe YAML in which `1e-4` is a number and only true and false are booleans (YAML 1.2)."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, exp) for tag, exp in resolvers if not tag.endswith((":bool", ":float", ":timestamp"))
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$"), list("tf"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+\.\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+)$"),
    list("-+.0123456789"),
)

Lines = dict[tuple[str | int, ...], int]


def parse_yaml(text: str, name: str) -> tuple[dict[str, Any], Lines]:
    """Plain data and the line of every key; refuses duplicates, aliases, tags, more documents."""
    loader = _Loader(text)
    lines: Lines = {}
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            mark = f"{name}:{event.start_mark.line + 1 if event.start_mark else 1}"
            tag = getattr(event, "tag", None)
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise RecipeError("an alias or anchor", where=mark, expected="plain YAML data")
            if tag:
                raise RecipeError(f"the tag {tag}", where=mark, expected="plain YAML data")
        node = loader.get_single_node()
        data = _construct(loader, node, name, lines, ()) if node is not None else {}
    except yaml.YAMLError as error:
        at = getattr(error, "problem_mark", None)
        where = f"{name}:{at.line + 1}" if at is not None else name
        problem = getattr(error, "problem", None) or str(error)
        raise RecipeError(f"not valid YAML: {problem}", where=where) from None
    except RecursionError:
        raise RecipeError("nested too deeply", where=name, expected="a recipe") from None
    if not isinstance(data, dict):
        raise RecipeError(
            f"a {type(data).__name__}", where=f"{name}:1", expected="keys such as model: and data:"
        )
    return data, lines


def _construct(
    loader: _Loader, node: yaml.Node, name: str, lines: Lines, at: tuple[str | int, ...]
) -> Any:
    lines.setdefault(at, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        out: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise RecipeError("a key that is not text", where=f"{name}:{line}")
            key = str(key_node.value)
            if key in out:
                raise RecipeError(
                    f"the key {key!r} is given twice (first on line {lines[(*at, key)]})",
                    where=f"{name}:{line}",
                    remedy="keep one of them",
                )
            lines[(*at, key)] = line
            out[key] = _construct(loader, value_node, name, lines, (*at, key))
        return out
    if isinstance(node, yaml.SequenceNode):
        return [
            _construct(loader, child, name, lines, (*at, index))
            for index, child in enumerate(node.value)
        ]
    try:
        return loader.construct_object(node)
    except (ValueError, OverflowError) as error:
        raise RecipeError(str(error), where=f"{name}:{node.start_mark.line + 1}") from None
