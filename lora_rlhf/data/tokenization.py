# SPDX-License-Identifier: Apache-2.0
"""The one layout of tokens, and a memory of what has been tokenised.

Filters, SFT, reward model, controls and evaluation ask for the same texts again and again. Every
text is tokenised once as long as its tokenizer lives, which is a run: ids are kept under the
fingerprint of what they are ids of, and the texts themselves are not kept.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from array import array
from collections.abc import Callable, Sequence
from typing import Any

Prompt = str | list[dict[str, str]]
"""A text, or messages."""

_KNOWN: weakref.WeakKeyDictionary[Any, dict[bytes, array[int]]] = weakref.WeakKeyDictionary()
"""Tokenizer -> fingerprint -> ids."""


def prompt_ids(tokenizer: Any, prompts: Sequence[Prompt]) -> list[array[int]]:
    """Ids of each prompt, up to where the model has to answer; as TRL's rollouts tokenise it.

    Args:
        tokenizer: A Hugging Face tokenizer.
        prompts: All texts, or all messages.

    Raises:
        jinja2.TemplateError: The chat template refuses one.
    """
    plain = not prompts or isinstance(prompts[0], str)

    def encode(missing: list[Prompt]) -> list[list[int]]:
        texts = [
            p
            if isinstance(p, str)
            else tokenizer.apply_chat_template(p, add_generation_prompt=True, tokenize=False)
            for p in missing
        ]
        # A template writes its special tokens itself.
        encoded = tokenizer(texts, add_special_tokens=plain, verbose=False)
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    kind = "text" if plain else f"messages {tokenizer.chat_template}"
    return _remembered(tokenizer, kind, prompts, encode)


def completion_ids(tokenizer: Any, texts: Sequence[str]) -> list[array[int]]:
    """Ids of each completion without its eos. Control tokens written in the text stay text."""

    def encode(missing: list[str]) -> list[list[int]]:
        encoded = tokenizer(
            missing, add_special_tokens=False, split_special_tokens=True, verbose=False
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    return _remembered(tokenizer, "completion", texts, encode)


def _remembered(
    tokenizer: Any, kind: str, asked: Sequence[Any], encode: Callable[[list[Any]], list[list[int]]]
) -> list[array[int]]:
    """Ids of each, those that are not known yet encoded in one call."""
    known = _KNOWN.setdefault(tokenizer, {})
    marks = [_fingerprint(kind, one) for one in asked]
    missing = {m: one for m, one in zip(marks, asked, strict=True) if m not in known}
    if missing:
        ids = encode(list(missing.values()))
        known.update((m, array("i", row)) for m, row in zip(missing, ids, strict=True))
    return [known[mark] for mark in marks]


def _fingerprint(kind: str, one: Any) -> bytes:
    text = f"{kind}\0{one if isinstance(one, str) else json.dumps(one)}"
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
