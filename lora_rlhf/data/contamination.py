# SPDX-License-Identifier: Apache-2.0
"""Training rows that overlap evaluation prompts: 13 words in a row, as in GPT-3, or MinHash."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from . import near_duplicates
from .filters import FilteredSet, normalised
from .row_formats import text_of

SUITES = "suites"
"""Name of the set with the prompts of evaluation suites."""

OVERLAP = "overlap with evaluation prompts"
"""Beginning of a note on contaminated rows, of which a run warns, and the filter's name."""

WORDS = 13
SIMILAR = 0.8
"""Jaccard index from which a prompt resembles an evaluation prompt."""

_WORD = re.compile(r"\w+")


class EvaluationPrompts:
    """An index of evaluation prompts, by set."""

    def __init__(self, sets: Mapping[str, Sequence[str]]) -> None:
        self._grams: dict[bytes, str] = {}
        self._index = near_duplicates.bands(SIMILAR)
        self._texts: list[tuple[str, set[bytes]]] = []
        for name, texts in sets.items():
            plain = list(dict.fromkeys(map(normalised, texts)))
            for text, one in zip(plain, near_duplicates.signatures(iter(plain)), strict=True):
                self._index.insert(len(self._texts), one)
                self._texts.append((name, near_duplicates.shingles(text)))
                for gram in _grams(text):
                    self._grams.setdefault(gram, name)

    def overlap(self, prompt: str, rest: str, signature: Any) -> str | None:
        """Return the set with a prompt that a row's prompt resembles or its text repeats."""
        grams = (gram for text in (prompt, rest) for gram in _grams(text))
        if name := next((self._grams[gram] for gram in grams if gram in self._grams), None):
            return name
        own = near_duplicates.shingles(prompt)
        near = (self._texts[i] for i in sorted(self._index.query(signature)))
        return next(
            (n for n, other in near if near_duplicates.jaccard(own, other) >= SIMILAR), None
        )


def _grams(text: str) -> Iterator[bytes]:
    words = _WORD.findall(text)
    for i in range(len(words) - WORDS + 1):
        yield hashlib.sha256(" ".join(words[i : i + WORDS]).encode()).digest()[:8]


def clean(
    kept: FilteredSet, rows: list[dict[str, Any]], sets: Mapping[str, Sequence[str]], action: str
) -> list[dict[str, Any]]:
    """Drop or count the training rows that overlap evaluation prompts; rows of a task stay.

    Args:
        sets: The evaluation prompts by set.
        action: drop or warn.
    """
    index = EvaluationPrompts(sets)
    hits: Counter[str] = Counter()
    bad: set[int] = set()
    prompts = [normalised(text_of(row["prompt"])) for row in rows]
    for number, signature in enumerate(near_duplicates.signatures(iter(prompts))):
        row = rows[number]
        answers = [row[c] for c in ("completion", "chosen", "rejected") if c in row]
        rest = normalised("\n".join(map(text_of, answers)))
        overlap = None if row["item"] else index.overlap(prompts[number], rest, signature)
        if overlap is not None:
            hits[overlap] += 1
            bad.add(number)
    against = {name: len(texts) for name, texts in sets.items()}
    kept.more["contamination"] = {"against": against, "rows": dict(hits)}
    if action == "drop":
        left = [row for number, row in enumerate(rows) if number not in bad]
        kept.counts[OVERLAP] = {"before": len(rows), "after": len(left)}
        return left
    for name, n in hits.items():
        kept.notes[f"{OVERLAP} of {name}; see data.contamination"] += n
    return rows
