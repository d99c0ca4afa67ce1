# SPDX-License-Identifier: Apache-2.0
"""Near-duplicate prompts: by MinHash and bands of it (LSH), and by a long common beginning.

Memory for n prompts: a signature of 256 bytes each, beside the prompts themselves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

from lora_rlhf import extras
from lora_rlhf.recipe.schema import Recipe

from .filters import FilteredSet, normalised
from .row_formats import Example, text_of

WORDS = 3
"""Words of a shingle; similarity is the Jaccard index of two texts' sets of shingles."""

_PERMUTATIONS = 64
_HEADS = 16  # texts of one bucket of a band with which a text is compared
_MISSES = (0.1, 0.9)  # a false candidate costs a comparison, a missed one stays in the set
_USER, _EXTRA = "data.near_duplicates", "hygiene"


def shingles(text: str) -> set[bytes]:
    """Return every three words in a row of a normalised text."""
    words = text.split()
    starts = range(max(1, len(words) - WORDS + 1))
    return {" ".join(words[i : i + WORDS]).encode() for i in starts}


def jaccard(a: set[bytes], b: set[bytes]) -> float:
    """Return the share of common shingles among all shingles of two texts."""
    return len(a & b) / (len(a | b) or 1)


def signatures(texts: Iterator[str]) -> Iterator[Any]:
    """Yield the MinHash of each normalised text."""
    datasketch = extras.load("datasketch", _USER, _EXTRA)
    sets = (shingles(text) for text in texts)
    yield from datasketch.MinHash.generator(sets, num_perm=_PERMUTATIONS)


def bands(threshold: float) -> Any:
    """Return an empty index whose bands catch most texts as similar as the threshold."""
    datasketch = extras.load("datasketch", _USER, _EXTRA)
    return datasketch.MinHashLSH(threshold, num_perm=_PERMUTATIONS, weights=_MISSES)


def originals(texts: Sequence[str], threshold: float) -> list[int]:
    """Return for each normalised text an earlier one that it resembles, else its own number.

    Candidates share a band of their signatures; the Jaccard index of their shingles decides.
    """
    import numpy

    # datasketch's own index takes 2.3 kB a text; a matrix that is sorted band by band takes 256 B.
    index = bands(threshold)
    matrix = numpy.empty((len(texts), _PERMUTATIONS), numpy.uint32)
    for number, one in enumerate(signatures(iter(texts))):
        matrix[number] = one.hashvalues
    first = list(range(len(texts)))
    odd = numpy.random.default_rng(0).integers(2**63, size=index.r, dtype=numpy.uint64) * 2 + 1
    for band in range(index.b):
        keys = (matrix[:, band * index.r : (band + 1) * index.r] * odd).sum(1, dtype=numpy.uint64)
        order = numpy.argsort(keys, kind="stable")
        starts = numpy.flatnonzero(numpy.diff(keys[order], prepend=keys[order][:1] + 1))
        sizes = numpy.diff(starts, append=len(order))
        for start, size in zip(starts[sizes > 1], sizes[sizes > 1], strict=True):
            _compare([int(i) for i in order[start : start + size]], texts, threshold, first)
    return first


def _compare(bucket: list[int], texts: Sequence[str], threshold: float, first: list[int]) -> None:
    """Compare the texts of one bucket, which are in order, with the originals among them."""
    heads: list[tuple[int, set[bytes]]] = []
    for number in bucket:
        if first[number] != number:
            continue
        own = shingles(texts[number])
        same = next((head for head, theirs in heads if jaccard(own, theirs) >= threshold), None)
        if same is not None:
            first[number] = same
        elif len(heads) < _HEADS:
            heads.append((number, own))


def drop(kept: FilteredSet, examples: list[Example], recipe: Recipe) -> list[Example]:
    """Drop and count examples whose prompt resembles an earlier one that is not the same.

    Other answers to the very same prompt are kept; the prompts of a task and those of
    `data.evaluate` stay as they are.
    """
    if kept.name == "evaluate":
        return examples
    threshold, length = recipe.data.near_duplicates, recipe.data.common_prefix
    left = examples
    if length is not None:
        beginnings: dict[bytes, bytes] = {}
        left = [one for one in examples if one.item or _begins_first(one, length, beginnings)]
        reason = f"first {length} characters as in an earlier prompt"
        kept.counts[reason] = {"before": len(examples), "after": len(left)}
    if threshold is not None:
        prompts = (normalised(text_of(one.prompt)) for one in left if not one.item)
        texts = list(dict.fromkeys(prompts))
        first = originals(texts, threshold) if texts else []
        good = {text for number, text in enumerate(texts) if first[number] == number}
        before = len(left)
        left = [one for one in left if one.item or normalised(text_of(one.prompt)) in good]
        kept.counts["near-duplicate prompt"] = {"before": before, "after": len(left)}
    return left


def _begins_first(example: Example, length: int, beginnings: dict[bytes, bytes]) -> bool:
    text = normalised(text_of(example.prompt))
    if len(text) < length:
        return True
    start, whole = (hashlib.sha256(part.encode()).digest()[:8] for part in (text[:length], text))
    return beginnings.setdefault(start, whole) == whole
