# SPDX-License-Identifier: Apache-2.0
"""Mask secrets by their shape or their key, and home folders; escape control characters."""

from __future__ import annotations

import os
import re
from collections import Counter
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")

TOKENS = {
    "a Hugging Face token": re.compile(r"hf_(?<![A-Za-z0-9]hf_)[A-Za-z0-9]{16,}"),
    "an API key": re.compile(r"sk-(?<![A-Za-z0-9]sk-)(?=[A-Za-z_-]{0,64}+\d)[\w-]{16,}"),
    "an AWS key": re.compile(r"AKIA(?<![A-Za-z0-9]AKIA)[0-9A-Z]{16}"),
    "a GitHub token": re.compile(r"g(?<![A-Za-z0-9]g)(h[pousr]_|ithub_pat_)\w{20,}"),
    "a GitLab token": re.compile(r"glpat-(?<![A-Za-z0-9]glpat-)[\w-]{16,}"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*"),
}
"""Shapes of secrets that cannot be words, at any place in a text.

The search takes linear time: a part before a required one is bounded, or cannot hold the start of
another match. Each shape begins with letters of its own, for which a search looks ten times faster
than at every place; what may not stand before them is tested after them. An API key must have a
digit within its first 65 characters.
"""

HIDDEN = "***"

SHORTEST = 12
"""Characters; a shorter value of a variable could be an ordinary word."""

_VARIABLE = re.compile(
    r"(TOKEN|SECRET(_?KEY)?|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY)S?(?![A-Za-z])"
    r"(?!.*_(PATH|FILE|DIR|NAME|ID)S?$)",
    re.IGNORECASE,
)
"""Names of variables with secrets: the word ends the name, or `_` or a digit follows.

TOKENIZERS_PARALLELISM is not one, nor is the name of a place or a thing, such as HF_TOKEN_PATH.
"""
_MODEL = re.compile(r"[A-Za-z._-]{1,24}/[A-Za-z._-]{1,24}")

_IN_ADDRESS = re.compile(r"(?<=://)([\w.%+~-]+):[^\s/@]+(?=@)")  # https://user:password@host
_SECRET = re.compile(r"token|secret|passw|credential|(api|access|private)_?key", re.IGNORECASE)
_NUMBER_TOO = re.compile(r"secret|passw|credential|key", re.IGNORECASE)  # not a token count
_NO_SECRET = re.compile(
    r"(eos|bos|pad|unk|sep|cls|mask|stop)_tokens?(_ids?)?|tokens|(max|min|num)_\w*tokens?|"
    r"tokenizer\w*|include_num_input_tokens_seen|num_assistant_tokens_schedule",
    re.IGNORECASE,
)
"""Keys of trainers that are about tokens of text."""


class _Known(NamedTuple):
    """Secrets of this machine, looked up once for a whole value."""

    values: tuple[str, ...]
    homes: tuple[str, ...]


def hide(value: Any, key: str = "") -> Any:
    """Mask plain data: values under secret-like keys, and secrets by their shape."""
    return _masked(value, _known(), key)


def safe(value: T) -> T:
    """Mask plain data or text for a file or a screen, by shape alone."""
    masked: T = _masked(value, _known(), None)
    return masked


def _masked(value: Any, known: _Known, key: str | None) -> Any:
    """Mask a value by shape and key; with a key of None by shape alone, in keys as well."""
    secret = key is not None and _SECRET.search(key) and not _NO_SECRET.fullmatch(key)
    if isinstance(value, dict):
        if key is None:
            return {_masked(k, known, None): _masked(v, known, None) for k, v in value.items()}
        return {k: _masked(v, known, key if secret else str(k)) for k, v in value.items()}
    if isinstance(value, list) or (key is None and isinstance(value, tuple)):
        return [_masked(v, known, key) for v in value]
    if isinstance(value, str):
        return HIDDEN if value and secret else _without_secrets(value, known)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return HIDDEN if number and secret and _NUMBER_TOO.search(key or "") else value


_OBEYED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    """Escape control characters, bidirectional marks and lone surrogates."""
    return _OBEYED.sub(lambda match: ascii(match[0])[1:-1], text)


def count_secrets(text: str) -> Counter[str]:
    """Count the secrets of each kind in a text, by their shapes."""
    return +Counter({kind: len(shape.findall(text)) for kind, shape in TOKENS.items()})


def variables() -> dict[str, str]:
    """Map value to name of environment variables with secrets, by their names.

    Values that are an existing path or `org/name` are left out, since all texts may hold them.
    """
    named = ((os.environ.get(name, ""), name) for name in os.environ if _VARIABLE.search(name))
    return {
        value: name for value, name in named if len(value) >= SHORTEST and not _names_a_thing(value)
    }


def _names_a_thing(value: str) -> bool:
    if not any(mark in value for mark in {"/", os.sep}):
        return False  # a secret, even if a file has that name
    return bool(_MODEL.fullmatch(value)) or os.path.exists(value)


def _known() -> _Known:
    home = os.path.expanduser("~")
    homes = dict.fromkeys(folder for folder in (home, os.path.realpath(home)) if len(folder) > 1)
    return _Known(tuple(variables()), tuple(homes))


def _without_secrets(text: str, known: _Known) -> str:
    for value in known.values:
        text = text.replace(value, HIDDEN)
    for pattern in TOKENS.values():
        text = pattern.sub(HIDDEN, text)
    text = _IN_ADDRESS.sub(rf"\1:{HIDDEN}", text)
    for folder in known.homes:
        if folder in text:
            text = re.sub(rf"(?<![\w.~-]){re.escape(folder)}(?![\w-]|\.\w)", "~", text)
    return text
