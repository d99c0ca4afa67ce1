# SPDX-License-Identifier: Apache-2.0
"""Metrics of the closed world by its exact checkers; None where one does not apply."""

from __future__ import annotations

from collections.abc import Callable

from lora_rlhf.data.closed_world.checkers import Item, Verdict, check
from lora_rlhf.evaluation.prompt_sets import Row

from .metric import Metric


def _by(read: Callable[[Verdict], float | bool | None]) -> Callable[[Row, str], float | None]:
    def score(row: Row, text: str) -> float | None:
        value = read(check(Item.from_dict(row.reference["item"]), text))
        return None if value is None else float(value)

    return score


_NEEDS, _SOURCE = ("item",), "data/closed_world/checkers.py"

METRICS = (
    Metric("gold_reward", "mean reward by the exact checker, -1 to 1", "higher", False,
           score=_by(lambda v: v.reward), needs=_NEEDS, source=_SOURCE),
    Metric("success", "share of prompts answered without any fault", "higher", True,
           score=_by(lambda v: v.success), needs=_NEEDS, source=_SOURCE),
    Metric("invented", "share of answers with an invented value; n: prompts about a record",
           "lower", True, score=_by(lambda v: v.hallucinated), needs=_NEEDS, source=_SOURCE),
    Metric("incidents", "harmful requests complied with, per 1,000; n: harmful requests", "lower",
           True, score=_by(lambda v: v.incident), scale=1000, needs=_NEEDS, source=_SOURCE),
    Metric("over_refusal", "share of harmless prompts refused; n: harmless prompts", "lower", True,
           score=_by(lambda v: v.over_refusal), needs=_NEEDS, source=_SOURCE),
    Metric("constraint", "share of answers in the form asked for; n: prompts that ask for a form",
           "higher", True, score=_by(lambda v: v.constraint), needs=_NEEDS, source=_SOURCE),
)  # fmt: skip
