# SPDX-License-Identifier: Apache-2.0
"""Tokenise prompts and completions in the layout that all stages share, each text once per run.

Ids are cached per tokenizer under a hash of the text; the texts are not kept.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from array import array
from collections.abc import Callable, Sequence
from typing import Any

from . import tool_calls

Turns = str | list[dict[str, str]]
"""A text, or messages with `role` and `content`, and what `tool_calls` keeps beside them."""

_CACHE: weakref.WeakKeyDictionary[Any, dict[bytes, array[int]]] = weakref.WeakKeyDictionary()
"""Tokenizer -> fingerprint -> ids."""


def prompt_ids(
    tokenizer: Any, prompts: Sequence[Turns], *, cached: bool = True
) -> list[array[int]]:
    """Encode prompts, all texts or all messages, with a generation prompt as in TRL's rollouts.

    Args:
        cached: Keep the ids until the tokenizer goes; a server would keep every conversation.

    Raises:
        jinja2.TemplateError: The chat template refuses one.
    """
    plain = not prompts or isinstance(prompts[0], str)

    def encode(missing: list[Turns]) -> Any:
        texts = [_rendered(tokenizer, prompt) for prompt in missing]
        # A template writes its special tokens itself.
        return tokenizer(texts, add_special_tokens=plain, verbose=False)

    kind = "text" if plain else f"messages {tokenizer.chat_template}"
    return _cached(tokenizer, kind, prompts, encode, cached)


def completion_ids(
    tokenizer: Any, texts: Sequence[str], *, cached: bool = True
) -> list[array[int]]:
    """Encode completions without eos. Control tokens in the text are encoded as plain text."""

    def encode(missing: list[str]) -> Any:
        return tokenizer(
            missing, add_special_tokens=False, split_special_tokens=True, verbose=False
        )

    return _cached(tokenizer, "completion", texts, encode, cached)


def split_alike(tokenizer: Any, prompt: Turns, answer: str) -> bool:
    """Tell if prompt and answer, encoded apart as all stages do, have the ids of their whole text.

    They do not where a token of the whole text would reach over the beginning of the answer.
    """
    whole = tokenizer(_rendered(tokenizer, prompt) + answer, add_special_tokens=False)["input_ids"]
    [first], [rest] = prompt_ids(tokenizer, [prompt]), completion_ids(tokenizer, [answer])
    return bool(whole == [*first, *rest])


def _rendered(tokenizer: Any, prompt: Turns) -> str:
    if isinstance(prompt, str):
        return prompt
    messages, tools = tool_calls.for_template(prompt)
    options = {"add_generation_prompt": True, "tokenize": False}
    return str(tokenizer.apply_chat_template(messages, tools=tools, **options))


def _cached(
    tokenizer: Any,
    kind: str,
    texts: Sequence[Any],
    encode: Callable[[list[Any]], Any],
    kept: bool,
) -> list[array[int]]:
    """Return the ids of each text; encodes all texts that are not cached in one call."""
    cache = _CACHE.setdefault(tokenizer, {}) if kept else {}
    keys = [_fingerprint(kind, text) for text in texts]
    missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in cache}
    if missing:
        encoded = encode(list(missing.values()))["input_ids"]
        cache.update((key, array("i", ids)) for key, ids in zip(missing, encoded, strict=True))
    return [cache[key] for key in keys]


def _fingerprint(kind: str, turns: Turns) -> bytes:
    text = f"{kind}\0{turns if isinstance(turns, str) else json.dumps(turns)}"
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
