# SPDX-License-Identifier: Apache-2.0
"""Short answers to questions of fact: right, wrong, or no answer given.

A logistic regression on how the answer's words, numbers and letters agree with the references
decides; people's judgements of other systems' answers trained it (`short_answers.json`). An answer
that says it does not know is neither right nor wrong.
"""

from __future__ import annotations

import difflib
import functools
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lora_rlhf.data import abstention
from lora_rlhf.evaluation.prompt_sets import Row

from .metric import Metric

PARAMETERS = Path(__file__).with_suffix(".json")

_SMALL = frozenset(
    "of in on at to and for from with by is was were be it its this that as or".split()
)
_NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
).split()
_ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth".split()
_DIGITS = {word: str(n) for n, word in enumerate(_NUMBERS)}
_DIGITS |= {word: str(n) for n, word in enumerate(_ORDINALS, 1)}
_ASKS = ("who", "when", "where", "what", "which", "how many", "how", "why", "meaning")


def words(text: str) -> list[str]:
    """The words of a text without accents, articles and case; numbers as digits."""
    plain = unicodedata.normalize("NFKD", text).replace("\xad", "").lower()
    plain = "".join(c for c in plain if not unicodedata.combining(c))
    plain = re.sub(r"'s\b", "", re.sub(r"(?<=\d),(?=\d)", "", plain))
    parts = re.findall(r"[^\W\d_]+|\d+(?:\.\d+)?", plain)
    return [_DIGITS.get(part, part) for part in parts if part not in ("a", "an", "the")]


def _stem(word: str) -> str:
    return word[:6].removesuffix("s") if len(word) > 3 else word


def _shares(a: Counter[str], b: Counter[str]) -> tuple[float, float, float]:
    """Return what the two share: of a, of b, and F1."""
    shared = (a & b).total()
    both = a.total() + b.total()
    of_a, of_b = (shared / one.total() if one else 0.0 for one in (a, b))
    return of_a, of_b, 2 * shared / both if both else 0.0


def _grams(text: str) -> Counter[str]:
    return Counter(text[i : i + 3] for i in range(len(text) - 2))


def _nearest(answer: Sequence[str], right: Sequence[str]) -> float:
    """Return the mean likeness of each word and the nearest one of the other text."""
    best = [
        max((difflib.SequenceMatcher(None, one, other).ratio() for other in right), default=0.0)
        for one in answer
    ]
    return sum(best) / len(best) if best else 0.0


def _initials(parts: Sequence[str]) -> str:
    return "".join(part[0] for part in parts if part not in _SMALL)


def _against(question: set[str], right: str, answer: str) -> dict[str, float]:
    """Features of an answer and one reference; the question's own words are no evidence."""
    r, a = words(right), words(answer)
    rs, as_ = [_stem(x) for x in r], [_stem(x) for x in a]
    new_r, new_a = ([x for x in s if x not in question and x not in _SMALL] for s in (rs, as_))
    made: dict[str, float] = {}
    for name, one, other in (
        ("words", Counter(rs), Counter(as_)),
        ("new", Counter(new_r), Counter(new_a)),
        ("grams", _grams(f" {' '.join(r)} "), _grams(f" {' '.join(a)} ")),
    ):
        made[f"{name}/right"], made[f"{name}/answer"], made[f"{name}/f1"] = _shares(one, other)
    numbers, given = ({x for x in s if x[0].isdigit()} for s in (r, a))
    joined = " ".join(a), " ".join(r)
    return made | {
        "ratio": difflib.SequenceMatcher(None, *joined).ratio(),
        "numbers equal": float(bool(numbers) and numbers == given),
        "numbers shared": float(bool(numbers & given)),
        "numbers differ": float(bool(numbers and given) and not numbers & given),
        "inside": float(bool(a) and f" {joined[0]} " in f" {joined[1]} "),
        "around": float(bool(r) and f" {joined[1]} " in f" {joined[0]} "),
        "near/answer": _nearest(as_, rs),
        "near/right": _nearest(rs, as_),
        "initials": float(
            len(a) == 1 < len(r)
            and _initials(r) == a[0]
            or len(r) == 1 < len(a)
            and _initials(a) == r[0]
        ),
        "last": float(bool(r and a) and rs[-1] == as_[-1]),
        "longest": max((len(x) for x in set(new_a) & set(new_r)), default=0) / 6,
    }


def features(question: str, references: Sequence[str], answer: str) -> dict[str, float]:
    """Features of an answer: the best of each over the references, and those of its form."""
    asked_for = {_stem(word) for word in words(question)}
    each = [_against(asked_for, right, answer) for right in references]
    made = {name: max(one[name] for one in each) for name in each[0]}
    given, right = words(answer), [words(one) for one in references]
    digits = [any(x[0].isdigit() for x in one) for one in (given, *right)]
    form = {
        "type differs": float(digits[0] not in digits[1:]),
        "no word shared": float(made["new/f1"] == 0 and not made["numbers shared"]),
        "capital": float(answer[:1].isupper()),
        "capital/right": sum(one[:1].isupper() for one in references) / len(references),
        "length": math.log1p(len(given)),
        "length/right": math.log1p(max(map(len, right))),
        "from the question": sum(_stem(x) in asked_for for x in given) / max(1, len(given)),
        **{f"asks {one}": float(f" {one} " in f" {question.lower()} ") for one in _ASKS},
    }
    return made | form | {f"{k} squared": made[k] ** 2 for k in ("new/f1", "grams/f1", "ratio")}


@functools.cache
def parameters() -> dict[str, Any]:
    """The packaged weights, their source, and the measured errors."""
    made: dict[str, Any] = json.loads(PARAMETERS.read_text(encoding="utf-8"))
    return made


def abstains(answer: str) -> bool:
    """Tell if an answer is empty, or says that it does not know."""
    return not words(answer) or abstention.says_unknown(answer)


def is_right(question: str, references: Sequence[str], answer: str) -> bool:
    """Tell if people would call the answer right."""
    if any(words(one) == words(answer) for one in references):
        return True
    fitted, given = parameters(), features(question, references, answer)
    return bool(fitted["bias"] + sum(w * given[n] for n, w in fitted["weights"].items()) >= 0)


def _graded(wanted: str) -> Callable[[Row, str], float | None]:
    """Make a metric: 1 if the answer is `right`, `wrong` or `none`, else 0."""

    def score(row: Row, answer: str) -> float | None:
        if abstains(answer):
            return float(wanted == "none")
        question = row.reference.get("question", row.question)
        grade = "right" if is_right(question, row.reference["answers"], answer) else "wrong"
        return float(wanted == grade)

    return score


def _judge() -> dict[str, Any]:
    """The grader as the report states it among the judges."""
    made = parameters()
    validation = made["validation"]
    right, wrong = (validation[f"recognised {one}"] for one in ("right", "wrong"))
    return {
        "name": "short-answer grader",
        "kind": "detector",
        "validation": {"people's labels": made["provenance"]["labels"], **validation},
        "trusted": right["low"] > 1 - wrong["low"],
        "why": f"of {validation['n']} judged answers that equal no reference, questions left out "
        f"of training, it recognises {right['value']:.0%} of the right and {wrong['value']:.0%} of "
        "the wrong ones; its errors on long answers are not known",
    }


_SHARED: dict[str, Any] = {
    "share": True, "needs": ("answers",), "judge": _judge(),
    "source": "metrics/short_answers.py; Min et al. 2021 (EfficientQA), people's judgements",
}  # fmt: skip

METRICS = (
    Metric(
        "short_answer_right",
        "share of questions with a right answer, as people would judge it; n: all questions",
        "higher",
        score=_graded("right"),
        **_SHARED,
    ),
    Metric(
        "short_answer_invented",
        "share of questions with a wrong answer; to say that one does not know is none; n: all "
        "questions",
        "lower",
        score=_graded("wrong"),
        **_SHARED,
    ),
    Metric(
        "short_answer_abstained",
        "share of questions on which the answer says that it does not know, or is empty; n: all "
        "questions",
        "neither",
        score=_graded("none"),
        **_SHARED,
    ),
)
