# SPDX-License-Identifier: Apache-2.0
"""What looks like a secret, by its shape or by the name of its key, and how it is hidden.

The folder of a person's home is one too: it names them. `~` stands for it.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")

TOKENS = {
    "a Hugging Face token": re.compile(r"(?<![A-Za-z0-9])hf_[A-Za-z0-9]{16,}"),
    "an API key": re.compile(r"(?<![A-Za-z0-9])sk-(?=[A-Za-z_-]{0,64}+\d)[\w-]{16,}"),
    "an AWS key": re.compile(r"(?<![A-Za-z0-9])AKIA[0-9A-Z]{16}"),
    "a GitHub token": re.compile(r"(?<![A-Za-z0-9])(gh[pousr]_|github_pat_)\w{20,}"),
    "a GitLab token": re.compile(r"(?<![A-Za-z0-9])glpat-[\w-]{16,}"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*"),
}
"""Shapes of secrets that are told apart from words by themselves, wherever they stand.

A text of any length is searched in time that grows as its length: what may stand before a part
that has to be there is bounded, or cannot hold the start of another match. A key's first digit is
looked for in its first 65 characters.
"""

HIDDEN = "***"

SHORTEST = 12
"""Characters; below it the value of a variable is a word, found in any text."""

_VARIABLE = re.compile(
    r"(TOKEN|SECRET(_?KEY)?|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY)S?(?![A-Za-z])"
    r"(?!.*_(PATH|FILE|DIR|NAME|ID)S?$)",
    re.IGNORECASE,
)
"""Names that end in such a word, or have `_` or a digit after it: none of TOKENIZERS_PARALLELISM.

What names a place or a thing (HF_TOKEN_PATH) is told with the rest of the text.
"""
_MODEL = re.compile(r"[A-Za-z._-]{1,24}/[A-Za-z._-]{1,24}")

_IN_ADDRESS = re.compile(r"(?<=://)([\w.%+~-]+):[^\s/@]+(?=@)")  # https://user:password@host
_SECRET = re.compile(r"token|secret|passw|credential|(api|access|private)_?key", re.IGNORECASE)
_NUMBER_TOO = re.compile(r"secret|passw|credential|key", re.IGNORECASE)  # a token count is none
_NO_SECRET = re.compile(
    r"(eos|bos|pad|unk|sep|cls|mask|stop)_tokens?(_ids?)?|tokens|(max|min|num)_\w*tokens?|"
    r"tokenizer\w*|include_num_input_tokens_seen|num_assistant_tokens_schedule",
    re.IGNORECASE,
)
"""Keys of trainers that speak of tokens of text."""


class _Known(NamedTuple):
    """What this machine has to hide beside the shapes, looked up once for all of a value."""

    values: tuple[str, ...]
    homes: tuple[str, ...]


def hide(value: Any, key: str = "") -> Any:
    """Plain data without its secrets: values under secret-like keys, and shapes of tokens."""
    return _hidden(value, key, _known())


def safe(value: T) -> T:
    """The same plain data, or text, for a file or a screen: no token in it and no home folder.

    Keys mean nothing here: what the user's own data hold is hidden by its shape alone.
    """
    told: T = _told(value, _known())
    return told


def _hidden(value: Any, key: str, known: _Known) -> Any:
    if isinstance(value, dict):
        return {k: _hidden(v, key if _by_key(key) else str(k), known) for k, v in value.items()}
    if isinstance(value, list):
        return [_hidden(v, key, known) for v in value]
    if isinstance(value, str):
        return HIDDEN if value and _by_key(key) else _without_secrets(value, known)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return HIDDEN if number and _by_key(key) and _NUMBER_TOO.search(key) else value


def _told(value: Any, known: _Known) -> Any:
    if isinstance(value, str):
        return _without_secrets(value, known)
    if isinstance(value, dict):
        return {_told(k, known): _told(v, known) for k, v in value.items()}
    return [_told(v, known) for v in value] if isinstance(value, list | tuple) else value


def found(text: str) -> Counter[str]:
    """How many secrets of each kind a text holds, by their shapes."""
    kinds = Counter({kind: len(shape.findall(text)) for kind, shape in TOKENS.items()})
    return +kinds


def variables() -> dict[str, str]:
    """Value -> name of the environment variables that hold a secret, by their names.

    Not where the value is the path of what is there, or `org/name`: it would be hidden everywhere.
    """
    return {
        value: name
        for name, value in os.environ.items()
        if len(value) >= SHORTEST and _VARIABLE.search(name) and not _names_a_thing(value)
    }


def _names_a_thing(value: str) -> bool:
    if not any(mark in value for mark in {"/", os.sep}):
        return False  # a file here that is called as a password is does not uncover it
    return bool(_MODEL.fullmatch(value)) or os.path.exists(value)


def _by_key(key: str) -> bool:
    return bool(_SECRET.search(key)) and not _NO_SECRET.fullmatch(key)


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
