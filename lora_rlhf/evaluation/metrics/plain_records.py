# SPDX-License-Identifier: Apache-2.0
"""Answers of any model to questions on a record: right, invented, or "not stated".

The record has values of known pools, so the check is exact for answers that name a value. An answer
that names none and does not abstain is unclear: neither right nor invented.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal

from lora_rlhf.data import abstention
from lora_rlhf.data.closed_world.vocabulary import POOLS
from lora_rlhf.evaluation.prompt_sets import Row

from .metric import Metric
from .short_answers import abstains

Outcome = Literal["right", "invented", "not stated", "unclear"]


def outcome(row: Row, answer: str) -> Outcome:
    """Sort an answer; a value that the record does not give for the question is invented."""
    record = row.reference["record"]
    text = answer.replace("’", "'").casefold()
    right = record["answer"].casefold()
    pool = {str(value).casefold() for value in POOLS[record["attribute"]]}
    own = {value.casefold() for name, value in record["facts"] if name != record["attribute"]}
    named = {value for value in pool if re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text)}
    if named - {right} - own:
        return "invented"
    if right and right in named:
        return "right"
    if not text.strip() or abstains(answer) or abstention.says_not_stated(answer):
        return "not stated"
    return "unclear"


def _share(wanted: Outcome, kind: str | None) -> Callable[[Row, str], float | None]:
    """Make a metric: 1 for an outcome; None for questions of another kind."""

    def score(row: Row, answer: str) -> float | None:
        stated = bool(row.reference["record"]["answer"])
        if kind is not None and kind != ("stated" if stated else "not stated"):
            return None
        return float(outcome(row, answer) == wanted)

    return score


_SHARED: dict[str, Any] = {
    "share": True, "needs": ("record",), "source": "metrics/plain_records.py; the closed world",
}  # fmt: skip

METRICS = (
    Metric("record_right", "share of questions that the record answers and the model answers "
           "right; n: these questions", "higher", score=_share("right", "stated"), **_SHARED),
    Metric("record_invented", "share of answers that name a value which the record does not give; "
           "n: all questions", "lower", score=_share("invented", None), **_SHARED),
    Metric("record_abstained_right", "share of questions without an answer in the record on which "
           "the model says so; n: these questions", "higher",
           score=_share("not stated", "not stated"), **_SHARED),
    Metric("record_abstained_wrong", "share of questions that the record answers on which the "
           "model says that it is not stated; n: these questions", "lower",
           score=_share("not stated", "stated"), **_SHARED),
    Metric("record_unclear", "share of answers that name no value and do not abstain; n: all "
           "questions", "lower", score=_share("unclear", None), **_SHARED),
)  # fmt: skip
