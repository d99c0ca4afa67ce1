# SPDX-License-Identifier: Apache-2.0
"""Verdicts of judges on pairs of answers, from scores or from both orders.

A judge that reads both answers at once is asked in both orders; a verdict that changes with the
order is a tie, and the share of such verdicts is reported (Zheng et al. 2023, 2306.05685,
section 3.4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .engine import finite
from .prompt_sets import Row


@dataclass(frozen=True)
class Pairs:
    """Two answers to each of N rows, for a judge.

    Attributes:
        rows: (N,) what the judge reads as the prompts.
        first: (N,) texts.
        second: (N,) texts.
        set_name: Set of the rows, and `names`, the targets that gave the answers: by these the
            rankings of people are found.
    """

    rows: Sequence[Row]
    first: Sequence[str]
    second: Sequence[str]
    set_name: str = ""
    names: tuple[str, str] = ("", "")


@dataclass
class Verdicts:
    """Verdicts on N pairs of answers.

    Attributes:
        wins: (N,) 1, 0.5 or 0; None where the judge cannot tell.
        changed: Share of verdicts that changed with the order; None for a judge without orders.
        at_random: (N,) whether the row was drawn at random for this judge; None: it judged all.
        odds: (N,) log-odds that the first answer is better, of a judge that has them.
        failed: Kind of failure -> requests that gave no verdict.
    """

    wins: list[float | None]
    changed: float | None = None
    at_random: list[bool] | None = None
    odds: list[float | None] | None = None
    failed: dict[str, int] = field(default_factory=dict)


Scores = Sequence[float | None]
"""Score of each answer; None for one that does not fit the judge's context."""


def by_score(first: Scores, second: Scores) -> list[float | None]:
    """Turn scores into verdicts; equal scores are a tie.

    Raises:
        NonFiniteError: A score is NaN or infinite, which would count as a loss.
    """
    finite("a judge's score", [score for score in (*first, *second) if score is not None])
    return [
        None if a is None or b is None else 0.5 if abs(a - b) <= 1e-9 else float(a > b)
        for a, b in zip(first, second, strict=True)
    ]


def by_orders(odds: Sequence[tuple[float, float] | None], equal: Sequence[bool]) -> Verdicts:
    """Turn log-odds of the first answer, in both orders, into verdicts; equal answers are a tie."""
    wins: list[float | None] = []
    changed = 0
    for pair, same in zip(odds, equal, strict=True):
        a, b = pair or (0.0, 0.0)
        agree = bool(a and b) and (a > 0) == (b > 0)
        wins.append(0.5 if same else None if pair is None else float(a > 0) if agree else 0.5)
        changed += not (same or pair is None or agree)
    means = [None if pair is None else sum(pair) / 2 for pair in odds]
    return Verdicts(wins, changed / max(len(wins) - wins.count(None), 1), odds=means)
