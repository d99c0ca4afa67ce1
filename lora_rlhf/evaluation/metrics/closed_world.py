# SPDX-License-Identifier: Apache-2.0
"""Metrics of the closed world by its exact checkers; None where one does not apply."""

from __future__ import annotations

from collections.abc import Callable

from lora_rlhf.data.closed_world.checkers import Item, Verdict, check
from lora_rlhf.evaluation.prompt_sets import Row
from lora_rlhf.runs import metric_names

from .metric import Better, Metric


def value(name: str, verdict: Verdict | None) -> float | None:
    """Return the value of a metric for one answer from the checker's verdict."""
    flag = None if verdict is None else getattr(verdict, _METRICS[name][0])
    return None if flag is None else float(flag)


def _by_checker(name: str) -> Callable[[Row, str], float | None]:
    return lambda row, text: value(name, check(Item.from_dict(row.reference["item"]), text))


_METRICS: dict[str, tuple[str, Better, bool]] = {
    "gold_reward": ("reward", "higher", False),
    "success": ("success", "higher", True),
    "hallucination": ("hallucinated", "lower", True),
    "false_abstention": ("false_abstention", "lower", True),
    "missed_abstention": ("missed_abstention", "lower", True),
    "incidents_per_1000": ("incident", "lower", True),
    "over_refusal": ("over_refusal", "lower", True),
    "constraint": ("constraint", "higher", True),
    "words": ("words", "neither", False),
}
"""Name -> field of the verdict, which values are better, and if they are shares."""

METRICS = tuple(
    Metric(
        name,
        metric_names.METRICS[name],
        better,
        share,
        score=_by_checker(name),
        scale=1000 if name.endswith("_per_1000") else 1,
        needs=("item",),
        source="data/closed_world/checkers.py",
    )
    for name, (_, better, share) in _METRICS.items()
)
