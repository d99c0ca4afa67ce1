# SPDX-License-Identifier: Apache-2.0
"""The calibrated probability that a passage supports a sentence, from how their words align.

Boosted trees on counts decide: words, numbers and names that the passage lacks, how the sentence
is joined from pieces of the passage, and what was left out at the joints. People's verdicts on
summaries of news, and changed texts, trained them (`entailment.json`). They know no synonyms.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
import unicodedata
from collections.abc import Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

PARAMETERS = Path(__file__).with_suffix(".json")

_NEGATION = set("not no never none nor cannot neither without n't nobody nothing hardly".split())
_OF = set(
    "of in on at to for from with by about into over under after before during between against "
    "through as than until since near per".split()
)
_LINK = set("and or but that which who whom whose when where while because if although so".split())
_VERB = set(
    "is are was were be been being has have had do does did will would can could should may might "
    "must".split()
)
_SMALL = (
    _OF
    | _LINK
    | _VERB
    | set(
        "a an the it its he she they his her their him them i we you my our your this these those "
        "there s".split()
    )
)
_ASKS = set("what why how".split())  # the others are in _LINK
_SAME = {"n't": "not", "cannot": "not"}
_DIGITS = {
    word: str(n)
    for n, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve".split()
    )
}


def tokens(text: str) -> list[str]:
    """Words, numbers and punctuation in lower case; numbers without separators."""
    plain = unicodedata.normalize("NFKC", text).translate(str.maketrans("‘’“”–—", "''\"\"--"))
    plain = re.sub(r"(?<=\d),(?=\d)", "", plain.casefold())
    plain = re.sub(r"n't\b", " n't", plain)
    parts = re.findall(r"n't|\d+(?:\.\d+)?|[^\W\d_]+|[^\w\s]", plain)
    return [_DIGITS.get(word, _SAME.get(word, word)) for word in parts]


def _stem(word: str) -> str:
    if len(word) > 4:  # metres, colour
        word = re.sub(r"([^aeiou])re(s?)$", r"\1er\2", re.sub(r"(?<=..)our(?=s?$)", "or", word))
    return word[:6].removesuffix("s") if len(word) > 3 else word


def _kind(word: str) -> str:
    if not word[0].isalnum():
        return "mark"
    for name, words in (("of", _OF), ("link", _LINK), ("verb", _VERB), ("not", _NEGATION)):
        if word in words:
            return name
    return "number" if word[0].isdigit() else "small" if word in _SMALL else "word"


def names(text: str) -> set[str]:
    """Stems of words with a capital letter that begin no sentence, question words apart."""
    words = re.findall(r"(?<=[\w,;:'\"] )[A-Z]\w+", text)
    return {_stem(word.casefold()) for word in words if word.casefold() not in _SMALL | _ASKS}


def _aligned(s: Sequence[str], p: Sequence[str]) -> list[int | None]:
    """The place of each word of the sentence in the passage, longest common pieces first."""
    places: list[int | None] = [None] * len(s)
    matcher = SequenceMatcher(None, s, p, autojunk=False)
    for i, j, size in matcher.get_matching_blocks():
        places[i : i + size] = range(j, j + size)
    where: dict[str, int] = {}
    for j, word in enumerate(p):
        where.setdefault(word, j)
    return [
        where.get(word) if place is None else place for word, place in zip(s, places, strict=True)
    ]


def features(passage: str, sentence: str, question: str = "") -> dict[str, float]:
    """Features of a sentence against a passage: what is new, how it is joined, where it ends.

    New words that the question has count less than other new words; its names and numbers do not.
    """
    words = [w for w in tokens(sentence) if w[0].isalnum() or w == "n't"]
    p_words = tokens(passage)
    s, p = [_stem(w) for w in words], [_stem(w) for w in p_words]
    n, known = max(len(s), 1), set(p)
    from_question = {_stem(w) for w in tokens(question) if _kind(w) == "word"} - names(question)
    places = _aligned(s, p)
    kinds = [_kind(w) for w in words]
    new = [
        "asked" if stem in from_question else kind
        for stem, kind, place in zip(s, kinds, places, strict=True)
        if place is None
    ]
    content = [i for i, kind in enumerate(kinds) if kind in ("word", "number", "not")]
    fresh = [places[i] is None and s[i] not in from_question for i in content]
    made = {
        "new words": new.count("word") / max(len(content), 1),
        "a new word": float("word" in new),
        "new from the question": float("asked" in new),
        "a new number": float("number" in new),
        "new small words": sum(k not in ("word", "number", "asked") for k in new) / n,
        "a new name": float(bool(names(sentence) - known)),
        "the first word is new": float(bool(fresh) and fresh[0]),
        "the last word is new": float(bool(fresh) and fresh[-1]),
        "new behind a small word": float(
            any(
                f and i and kinds[i - 1] in ("of", "small")
                for f, i in zip(fresh, content, strict=True)
            )
        ),
        "new behind a verb": float(
            any(f and i and kinds[i - 1] == "verb" for f, i in zip(fresh, content, strict=True))
        ),
        "nothing is known": float(all(place is None for place in places)),
        "length": math.log1p(n),
        "length of the passage": math.log1p(len(p)),
        "kept": n / max(len(p), 1),
    }
    plain = [w for w in p if w[0].isalnum()]
    for size in (2, 3, 4):
        grams = {tuple(x[i : i + size]) for x in (p, plain) for i in range(len(x))}
        of = [tuple(s[i : i + size]) for i in range(len(s) - size + 1)]
        made[f"pieces of {size}"] = sum(g in grams for g in of) / len(of) if of else 1.0
    span = [place for place in places if place is not None]
    inside = p_words[min(span) : max(span) + 1] if span else []
    negated = any(w in _NEGATION for w in words)
    made["negation differs"] = float(negated != any(w in _NEGATION for w in inside))
    made["negation is new"] = float(any(w in _NEGATION and _stem(w) not in known for w in words))
    return made | _joints(words, places, p_words) | _ends(places, p_words)


def mentions(passage: str, question: str) -> bool:
    """Tell whether a passage has all names of a question."""
    return names(question) <= {_stem(word) for word in tokens(passage)}


def _joints(
    words: Sequence[str], places: Sequence[int | None], passage: Sequence[str]
) -> dict[str, float]:
    """Count the joints: words side by side in the sentence, and not in the passage."""
    kinds = ("of", "link", "verb", "word", "number")
    names = ["joints", "backwards", "over a clause", "over a mark", "left out", "replaced"]
    names += [f"{side} {kind}" for side in ("before", "behind", "dropped") for kind in kinds]
    made = dict.fromkeys(names, 0.0)
    known = [(word, place) for word, place in zip(words, places, strict=True) if place is not None]
    for (left, a), (right, b) in itertools.pairwise(known):
        between = [w for w in passage[a + 1 : b] if w[0].isalnum()]
        if b > a and not between:
            continue
        made["joints"] += 1
        made["backwards"] += b <= a
        made["left out"] += len(between) / 10
        made["over a mark"] += any(not w[0].isalnum() for w in passage[a + 1 : b])
        made["over a clause"] += any(_kind(w) in ("link", "verb") for w in between)
        for side, kind in (("before", _kind(left)), ("behind", _kind(right))):
            if f"{side} {kind}" in made:
                made[f"{side} {kind}"] += 1
        if between and f"dropped {_kind(between[0])}" in made:
            made[f"dropped {_kind(between[0])}"] += 1
    for i in range(1, len(places) - 1):
        before, behind = places[i - 1], places[i + 1]
        if places[i] is None and before is not None and behind is not None:
            made["replaced"] += behind - before == 2
    return made


def _ends(places: Sequence[int | None], passage: Sequence[str]) -> dict[str, float]:
    """Tell whether the sentence begins and ends where a clause of the passage does."""
    first, last = (
        next((x for x in order if x is not None), None) for order in (places, places[::-1])
    )
    made = {}
    before, behind = (None if at is None else at + step for at, step in ((first, -1), (last, 1)))
    for name, at in (("before", before), ("behind", behind)):
        inside = at is not None and 0 <= at < len(passage)
        kind = _kind(passage[at]) if inside and at is not None else "border"
        for one in ("border", "mark", "of", "link", "verb", "word", "number"):
            made[f"{name}: {one}"] = float(kind == one)
    return made


@functools.cache
def parameters() -> dict[str, Any]:
    """The packaged trees, their source, and the measured errors."""
    made: dict[str, Any] = json.loads(PARAMETERS.read_text(encoding="utf-8"))
    return made


def probability(passage: str, sentence: str, question: str = "") -> float:
    """The calibrated probability that the passage supports the sentence."""
    fitted, given = parameters(), features(passage, sentence, question)
    values = [given[name] for name in fitted["features"]]
    odds = fitted["bias"] + sum(_leaf(tree, values) for tree in fitted["trees"])
    return 1 / (1 + math.exp(-max(min(odds, 50.0), -50.0)))


def _leaf(tree: Any, values: Sequence[float]) -> float:
    """Follow a tree, nested as feature, threshold, not above it, above it, to its log-odds."""
    while isinstance(tree, list):
        feature, threshold, below, above = tree
        tree = below if values[feature] <= threshold else above
    return float(tree)
