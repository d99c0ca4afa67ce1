# SPDX-License-Identifier: Apache-2.0
"""YAML as data, in and out: no tags, aliases or duplicates; YAML 1.2 scalars; every key's line."""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

from lora_rlhf.errors import RecipeError

_SCALARS: dict[str, tuple[str, list[str]]] = {
    "null": (r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    "bool": (r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    "int": (r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", list("-+0123456789")),
    "float": (
        r"^(?:[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+"
        r"|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN))$",
        list("-+.0123456789"),
    ),
}
"""What a scalar without quotes may be besides text, as YAML 1.2 has it: `yes` and dates are text,
010 is ten."""


class _Loader(yaml.SafeLoader):
    """Safe YAML with the scalars above."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML's own way to declare them


class _Dumper(yaml.SafeDumper):
    """Quotes every text that this loader, or one of YAML 1.1, would read as something else."""

    yaml_implicit_resolvers = {
        first: list(found) for first, found in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }

    def ignore_aliases(self, data: Any) -> bool:
        """Write data out twice where it is used twice: the loader takes no aliases."""
        return True


for _kind, (_pattern, _first) in _SCALARS.items():
    for _side in (_Loader, _Dumper):
        _side.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(_pattern), _first)


def _int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


def _float(loader: _Loader, node: yaml.ScalarNode) -> float:
    text = str(loader.construct_scalar(node))
    if text[-3:].lower() in ("inf", "nan"):
        return float(text.replace(".", ""))
    if math.isinf(float(text)):
        raise ValueError(f"{text} is beyond the largest number")
    return float(text)


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # Where these may end a line, PyYAML writes spaces for them unless they are escaped.
    style = '"' if set(text) & set("\x85\u2028\u2029") else None
    node: yaml.ScalarNode = dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)
    return node


_Dumper.add_representer(str, _text)
_Loader.add_constructor("tag:yaml.org,2002:int", _int)
_Loader.add_constructor("tag:yaml.org,2002:float", _float)

_DEEPEST = 50

Lines = dict[tuple[str | int, ...], int]


def parse_yaml(text: str, name: str) -> tuple[dict[str, Any], Lines]:
    """Plain data and the line of every key; refuses duplicates, aliases, tags, more documents."""
    lines: Lines = {}
    depth = 0
    try:
        loader = _Loader(text)
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST:  # PyYAML's time grows with the square of it
                raise RecursionError
            mark = f"{name}:{event.start_mark.line + 1 if event.start_mark else 1}"
            tag = getattr(event, "tag", None)
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise RecipeError("an alias or anchor", where=mark, expected="plain YAML data")
            if tag:
                raise RecipeError(f"the tag {tag:.100}", where=mark, expected="plain YAML data")
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


def dump_yaml(data: dict[str, Any]) -> str:
    """Plain data as YAML that `parse_yaml` reads back as the same data."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


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
                    f"the key {key!r:.100} is given twice (first on line {lines[(*at, key)]})",
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
        raise RecipeError(f"{error!s:.200}", where=f"{name}:{node.start_mark.line + 1}") from None
