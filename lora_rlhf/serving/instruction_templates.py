# SPDX-License-Identifier: Apache-2.0
"""Templates of `do`: Markdown files with a front matter, filled in by a small part of Jinja.

A template is data. It may print its variables, compare them and choose by `if`; there are no loops,
assignments, calls or arithmetic, so that filling one in takes time in proportion to its text.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any, Literal, get_args

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import BaseModel, ConfigDict, ValidationError

from lora_rlhf.data import sources
from lora_rlhf.errors import DataError, UsageError, first_line
from lora_rlhf.recipe import suggestions
from lora_rlhf.recipe.strict_yaml import parse_yaml

FOLDER = Path(__file__).with_name("templates")
Option = Literal["tone", "format", "length", "to", "labels", "schema", "question"]
OPTIONS = get_args(Option)
"""Options that a template may take or need."""

_VARIABLES = ("text", "form", "count", *OPTIONS)
"""Beside the options: the text, the format in words, and the number in the length."""
_LONGEST = 20_000
_FORMS = {
    "text": "as plain text",
    "bullets": 'as lines that begin with "- "',
    "json": "as JSON",
    "line": "on one line",
}
_ALLOWED = (
    nodes.Template, nodes.Output, nodes.TemplateData, nodes.If, nodes.Name, nodes.Const, nodes.Not,
    nodes.And, nodes.Or, nodes.Compare, nodes.Operand, nodes.CondExpr, nodes.Filter, nodes.Test,
)  # fmt: skip
_FILTERS: dict[str, Any] = {
    "join": lambda items, mark=", ": str(mark)[:20].join(map(str, items)),
    "lower": lambda text: str(text).lower(),
    "upper": lambda text: str(text).upper(),
    "trim": lambda text: str(text).strip(),
}


class Template(BaseModel):
    """A template: the options that it takes and needs, its checks, and its text.

    Attributes:
        sha256: Hash of the file: its version.
        split: A long text may be done in parts, whose results are done again.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str
    sha256: str
    text: str
    about: str = ""
    takes: list[Option] = []
    needs: list[Option] = []
    checks: list[Literal["quotes", "numbers", "in_source", "shorter", "same_language"]] = []
    split: bool = False

    def check_options(self, given: dict[str, Any]) -> None:
        """Check that the options are those that the template takes.

        Raises:
            UsageError: One is missing, or would have no effect.
        """
        if missing := [name for name in self.needs if not given.get(name)]:
            raise UsageError(f"{self.name} needs --{missing[0]}")
        known = {*self.takes, *self.needs}
        if unused := [name for name in given if given[name] and name not in known]:
            takes = ", ".join(f"--{name}" for name in OPTIONS if name in known) or "none"
            raise UsageError(
                f"the template {self.name} does not use --{unused[0]}",
                expected=f"its options: {takes}",
                remedy=f"leave it out, or write {unused[0]} into a copy of the template",
            )

    def fill(self, text: str, **options: Any) -> str:
        """Fill in a text and the options."""
        values = {name: options.get(name) for name in OPTIONS}
        values |= {"text": text, "form": _FORMS.get(options.get("format") or "")}
        values["count"] = options.get("count")
        try:
            return str(_compiled(self.text, self.name).render(values)).strip()
        except Exception as error:  # such as a filter over what is no list
            raise DataError(f"the template fails: {first_line(error)}", where=self.name) from None


def load(verb: str, path: Path | None = None) -> Template:
    """Load the packaged template of a verb, or a file.

    Raises:
        UsageError: There is no such verb.
        DataError: The file is no template.
    """
    if path is None and verb not in names():
        raise UsageError(
            f"unknown verb {verb!r}{suggestions.nearest(verb, names())}",
            expected=", ".join(names()),
            remedy="correct it, or give a template of your own by --template",
        )
    where = path or FOLDER / f"{verb}.md"
    source = sources.whole_text(where)
    opened, _, rest = source.partition("\n")
    front, closed, text = rest.partition("\n---\n")
    expected = "`---`, lines of about, takes, needs, checks or split, `---`, and the text"
    if opened.strip() != "---" or not closed or len(source) > _LONGEST:
        long = f"it has {len(source):,} characters, more than {_LONGEST:,}"
        given = long if len(source) > _LONGEST else "it has no front matter"
        raise DataError(given, where=str(where), expected=expected)
    _compiled(text, str(where))
    name = path.stem if path else verb
    fixed = {"name": name, "sha256": hashlib.sha256(source.encode()).hexdigest(), "text": text}
    try:
        return Template(**{**parse_yaml(front, str(where))[0], **fixed})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise DataError(f"{key}: {first['msg']}", where=str(where), expected=expected) from None


def source(verb: str) -> str:
    """Return the file of a packaged template, to copy and change."""
    load(verb)
    return (FOLDER / f"{verb}.md").read_text(encoding="utf-8")


def names() -> list[str]:
    """Return the verbs that have a packaged template."""
    return sorted(path.stem for path in FOLDER.glob("*.md"))


@functools.cache
def _compiled(text: str, where: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters = dict(_FILTERS)
    environment.globals = {}
    try:
        tree = environment.parse(text)
        _check_nodes(tree, where)  # before it is compiled: that computes constants
        return environment.from_string(text)
    except (jinja2.TemplateError, RecursionError) as error:
        line = getattr(error, "lineno", None)
        place = f"{where}:{line}" if line else where
        raise DataError(f"the template is broken: {first_line(error)}", where=place) from None


def _check_nodes(tree: nodes.Template, where: str) -> None:
    for node in tree.find_all(nodes.Node):
        unknown = node.name if isinstance(node, nodes.Name) else None
        if not isinstance(node, _ALLOWED) or unknown not in (None, *_VARIABLES):
            what = f"the name {unknown!r}" if unknown else type(node).__name__.lower()
            raise DataError(
                f"the template uses {what}",
                where=where,
                expected=f"the names {', '.join(_VARIABLES)}; if; and the filters "
                f"{', '.join(_FILTERS)}",
            )
    if not any(node.name == "text" for node in tree.find_all(nodes.Name)):
        raise DataError("the template does not print {{ text }}", where=where)
