# SPDX-License-Identifier: Apache-2.0
"""Faults of a model card: metadata, placeholders, secrets, links, code, claims without interval."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from lora_rlhf.errors import UsageError, reason
from lora_rlhf.redaction import TOKENS

from .card_markdown import is_number

_FRONT = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)
_PLACEHOLDER = re.compile(r"more information needed|\bTODO\b|\bTBD\b|\bFIXME\b|lorem ipsum", re.I)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HOME = re.compile(r"(?<![\w.])(?:/home/|/Users/|/root/|[A-Za-z]:\\+Users\\+)[\w.-]+")
_LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)\s#]+)")
_CODE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
_CLAIM = re.compile(
    r"\b(?:beats?|outperforms?|better than|superior to|surpass(?:es|ed)?|improves? (?:on|over))\b",
    re.I,
)
_INTERVAL = re.compile(r"(?:\[|&#91;)-?[\d.]+, -?[\d.]+|\binterval|±|\bn\s*=\s*\d")
_DENIED = re.compile(r"\b(?:not|no|unknown|whether|if|never)\b", re.I)


def lint(path: str | Path) -> list[str]:
    """Return the faults of a card, each as `file:line: what`; an empty list if there are none.

    Raises:
        UsageError: The file cannot be read.
    """
    path = Path(path)
    path = path / "README.md" if path.is_dir() else path
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path} cannot be read: {reason(error)}", expected="a model card"
        ) from None
    faults = [*_metadata(text), *_body(text, path.parent)]
    return [f"{path}:{line}: {what}" for line, what in sorted(faults)]


def _metadata(text: str) -> Iterator[tuple[int, str]]:
    front = _FRONT.match(text)
    if front is None:
        yield 1, "no metadata: a card begins with YAML between two lines of ---"
        return
    try:
        meta = yaml.safe_load(front[1])
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        yield (mark.line + 2 if mark else 1), "the metadata is not YAML"
        return
    if not isinstance(meta, dict):
        yield 1, "the metadata is not a mapping"
        return

    def line(key: str) -> int:
        return next((i for i, one in enumerate(text.split("\n"), 1) if one.startswith(key)), 1)

    for key, why, remedy in (
        ("license", "others may not use it", "card.license"),
        ("base_model", "nobody can load it", "model.hub_id"),
    ):
        if not meta.get(key):
            yield 1, f"no {key}: without it {why}; a recipe gives it as {remedy}"
    bases = meta.get("base_model") or []
    for base in bases if isinstance(bases, list) else [bases]:
        if not _HUB_ID.fullmatch(str(base)) or str(base).startswith("."):
            yield line("base_model"), f"base_model {base!r} is no id on the Hub"
    if str(meta.get("license") or "") in ("license", "unknown", "None"):
        yield line("license"), f"license: {meta['license']} is a placeholder"
    index = meta.get("model-index")
    if index and not _mappings(index):
        yield line("model-index"), "model-index is no list of mappings"
    for model in _mappings(index):
        for result in _mappings(model.get("results")):
            yield from ((line("model-index"), what) for what in _metrics(result))


def _mappings(given: Any) -> list[dict[str, Any]]:
    listed = given if isinstance(given, list) else []
    return [one for one in listed if isinstance(one, dict)]


def _metrics(result: dict[str, Any]) -> Iterator[str]:
    for metric in _mappings(result.get("metrics")):
        args, name = metric.get("args"), metric.get("type")
        args = args if isinstance(args, dict) else {}
        if not is_number(metric.get("value")):
            yield f"the metric {name} has no number"
        elif not (is_number(args.get("low")) and is_number(args.get("high"))):
            yield f"the metric {name} has no interval (args.low and args.high)"


def _body(text: str, folder: Path) -> Iterator[tuple[int, str]]:
    code = [(match.start(), match.end()) for match in _CODE.finditer(text)]
    start = front.end() if (front := _FRONT.match(text)) else 0
    body = text[start:]

    def number(at: int) -> int:
        return text.count("\n", 0, at) + 1

    for match in _PLACEHOLDER.finditer(text):
        yield number(match.start()), f"a placeholder: {match[0]}"
    for kind, shape in (TOKENS | {"a path of somebody's home": _HOME}).items():
        for match in shape.finditer(text):
            yield number(match.start()), f"what looks like {kind}"
    for match in _LINK.finditer(body):
        if not (folder / match[1]).exists():
            yield (
                number(start + match.start()),
                f"a link to {match[1]}, which is not beside the card",
            )
    for match in _CODE.finditer(text):
        if match[1] in ("python", "py"):
            try:
                ast.parse(match[2])
            except SyntaxError as error:
                yield number(match.start()) + (error.lineno or 1), "Python that does not parse"
    for match in re.finditer(r"[^.!?\n]*(?:\.\d[^.!?\n]*)*[.!?]?", body):
        at, sentence = start + match.start(), match[0]
        inside = any(begin <= at < end for begin, end in code)
        stated = not sentence.rstrip().endswith("?") and not sentence.lstrip().startswith("|")
        claims = _CLAIM.search(sentence) and not inside and stated
        if claims and not _INTERVAL.search(sentence) and not _DENIED.search(sentence):
            yield number(at), f"a claim without its interval: {' '.join(sentence.split()):.80}"
    if not re.search(r"^# ", body, re.MULTILINE):
        yield 1, "no title"
    if not code:
        yield 1, "no code that loads the model"
