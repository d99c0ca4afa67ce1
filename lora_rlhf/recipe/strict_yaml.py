# SPDX-License-Identifier: Apache-2.0
"""Strict YAML: no tags, aliases or duplicate keys; scalars of YAML 1.2; the line of every key."""

from __future__ import annotations

import contextlib
import math
import re
from typing import Any

import yaml

from lora_rlhf.errors import RecipeError

Key = str | int
Lines = dict[tuple[Key, ...], int]
"""Path of keys and list indices -> line; 0 for keys from `--set`."""

_MAX_DEPTH = 50

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
"""Kind of scalar -> its pattern and possible first characters, as in YAML 1.2.

All other scalars, such as `yes` and dates, are text; 010 is ten.
"""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader for plain data with these scalars, which records every key's line."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML declares them like this

    def __init__(self, text: str, name: str) -> None:
        super().__init__(text)
        # libyaml is ten times faster; where it finds an error, PyYAML's parser words it. PyYAML may
        # have been built without libyaml: then it has no CSafeLoader.
        with contextlib.suppress(yaml.YAMLError, UnicodeError, AttributeError):
            self.state = iter([*yaml.parse(text, Loader=yaml.CSafeLoader)]).__next__
        self.name, self.depth = name, 0
        self.lines: Lines = {}

    def where(self, place: Any) -> str:
        """Return `name:line` of a node or event."""
        return f"{self.name}:{place.start_mark.line + 1}"

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuse aliases, anchors, tags and deep nesting before anything is built."""
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        problem = ""
        if getattr(event, "anchor", None) or getattr(event, "tag", None):
            problem = "tags, anchors and aliases are not allowed"
        elif isinstance(event, yaml.CollectionStartEvent) and self.depth >= _MAX_DEPTH:
            problem = f"nested over {_MAX_DEPTH} levels deep"  # time is quadratic in the depth
        if problem:
            raise RecipeError(problem, where=self.where(event), expected="plain YAML data")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def plain(self, node: yaml.Node, at: tuple[Key, ...] = ()) -> Any:
        """Build plain data from the node at this path of keys."""
        self.lines.setdefault(at, node.start_mark.line + 1)
        if isinstance(node, yaml.SequenceNode):
            return [self.plain(child, (*at, index)) for index, child in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode):
            try:
                value = self.construct_object(node)
            except ValueError as error:  # an integer with too many digits
                raise RecipeError(f"{error!s:.200}", where=self.where(node)) from None
            if value in (math.inf, -math.inf) and "inf" not in node.value.lower():
                raise RecipeError(
                    f"{node.value:.100} is beyond the largest number",
                    where=self.where(node),
                    remedy="write it in quotes if it is a text, such as a commit",
                )
            return value
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise RecipeError("a key that is not text", where=self.where(key_node))
            key = str(key_node.value)
            path = (*at, key)
            if key in data:
                raise RecipeError(
                    f"the key {key!r:.100} is given twice (first on line {self.lines[path]})",
                    where=self.where(key_node),
                    remedy="keep one of them",
                )
            self.lines[path] = key_node.start_mark.line + 1
            data[key] = self.plain(value_node, path)
        return data


_FAST: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
"""libyaml's dumper, four times faster, where PyYAML was built with it."""


class _Dumper(_FAST):  # type: ignore[misc]
    """Dumper that quotes text which this loader or a YAML 1.1 loader would not read as text."""

    yaml_implicit_resolvers = {
        first: list(kinds) for first, kinds in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }

    def ignore_aliases(self, data: Any) -> bool:
        """Write shared data in full each time, since the loader refuses aliases."""
        return True


for _kind, (_pattern, _first) in _SCALARS.items():
    for _side in (_Loader, _Dumper):
        _side.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(_pattern), _first)


def _int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # PyYAML writes these line breaks as spaces unless they are escaped.
    style = '"' if set(text) & set("\x85\u2028\u2029") else None
    node: yaml.ScalarNode = dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)
    return node


_Dumper.add_representer(str, _text)
_Loader.add_constructor("tag:yaml.org,2002:int", _int)


def parse_yaml(text: str, name: str) -> tuple[dict[str, Any], Lines]:
    """Parse one YAML document into plain data and the line of every key.

    Raises:
        RecipeError: Not YAML, a duplicate key, an alias, a tag, or no mapping at the top.
    """
    try:
        loader = _Loader(text, name)
        node = loader.get_single_node()
        data = {} if node is None else loader.plain(node)
    except yaml.YAMLError as error:
        at = getattr(error, "problem_mark", None)
        where = f"{name}:{at.line + 1}" if at is not None else name
        problem = getattr(error, "problem", None) or str(error)
        escaped = "in double quotes a backslash begins an escape: write paths with / or in 'single "
        tab = "indent by spaces: YAML takes no tabs"
        remedy = f"{escaped}quotes'" if "escape" in problem else tab if "'\\t'" in problem else ""
        raise RecipeError(f"not valid YAML: {problem}", where=where, remedy=remedy) from None
    if not isinstance(data, dict):
        raise RecipeError(
            f"not a mapping but a {type(data).__name__}",
            where=f"{name}:1",
            expected="lines such as `key: value`",
        )
    return data, loader.lines


def list_items(text: str, name: str) -> list[str]:
    """Split the inside of a YAML list, such as `0.1, [a, b], "c, d"`, into the text of its items.

    Raises:
        RecipeError: It is not YAML, or an item is empty.
    """
    parse_yaml(f"items: [{text}]", name)
    node = yaml.compose(f"[{text}]", Loader=yaml.SafeLoader)
    items = node.value if isinstance(node, yaml.SequenceNode) else []
    return [text[i.start_mark.index - 1 : i.end_mark.index - 1].strip() for i in items]


def dump_yaml(data: dict[str, Any]) -> str:
    """Return plain data as YAML that `parse_yaml` reads back as equal data."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text
