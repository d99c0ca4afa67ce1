# SPDX-License-Identifier: Apache-2.0
"""Simulated labelers of the closed-world task, who agree at the rate that the recipe sets.

InstructGPT's labelers agreed on 73 % of pairs. A labeler prefers by gold reward with noise, as in
the Bradley-Terry model at a temperature.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from typing import Any

from lora_rlhf.estimates import share_interval

from .checkers import Item, check


def _expected_agreement(gaps: Sequence[float], temperature: float) -> float:
    chances = [1.0 / (1.0 + math.exp(-gap / temperature)) for gap in gaps]
    return sum(p * p + (1 - p) * (1 - p) for p in chances) / len(chances)


def calibrate(agreement: float, pairs: Sequence[tuple[float, float]]) -> float:
    """Return the temperature at which two labelers agree on this share of pairs of gold rewards.

    Pairs of equal rewards are left out, since they are ties at every temperature.

    Raises:
        ValueError: The agreement is not between 0.5 and 1, or all pairs are ties.
    """
    if not 0.5 < agreement < 1.0:
        raise ValueError(f"agreement must lie between 0.5 and 1, not {agreement}")
    gaps = [abs(a - b) for a, b in pairs if a != b]
    if not gaps:
        raise ValueError("no pair of different rewards to calibrate on")
    low, high = 1e-4, 1e4  # agreement falls as the temperature grows; bisect its logarithm
    for _ in range(60):
        middle = math.sqrt(low * high)
        if _expected_agreement(gaps, middle) > agreement:
            low = middle
        else:
            high = middle
    return math.sqrt(low * high)


def rank(rewards: Sequence[float], temperature: float, rng: random.Random) -> list[int]:
    """Return a labeler's rank for each gold reward, 1 = best; equal rewards share a rank.

    One Gumbel draw for each distinct reward (Plackett-Luce), so that any two of them are ordered
    as by Bradley-Terry: a above b with probability sigmoid((a - b) / temperature).
    """
    noisy = {
        r: r / temperature - math.log(-math.log(max(rng.random(), 1e-300)))
        for r in dict.fromkeys(rewards)
    }
    return [1 + sum(noisy[other] > noisy[r] for other in rewards) for r in rewards]


def noise(items: Sequence[Item], completions: Sequence[Sequence[str]], agreement: float) -> float:
    """Return the temperature at which two labelers agree at this rate on these answers."""
    return _noise(_gold(items, completions), agreement)


def _gold(items: Sequence[Item], completions: Sequence[Sequence[str]]) -> list[list[float]]:
    return [
        [check(item, text).reward for text in texts]
        for item, texts in zip(items, completions, strict=True)
    ]


def _noise(gold: Sequence[Sequence[float]], agreement: float) -> float:
    gaps = [(a, b) for each in gold for a, b in itertools.combinations(each, 2) if a != b]
    # Without pairs to calibrate on, labelers follow the gold reward.
    return calibrate(agreement, gaps) if agreement < 1 and gaps else 1e-6


def rank_all(
    items: Sequence[Item],
    completions: Sequence[Sequence[str]],
    agreement: float,
    seed: int,
    temperature: float | None = None,
) -> tuple[list[list[int]], dict[str, Any]]:
    """Rank the completions of each item as one labeler does, and compare with a second labeler.

    The labelers are calibrated on the same pairs that they judge, unless a temperature is given.

    Returns:
        The first labeler's ranks for each item, and the report: the requested agreement (`asked`),
        the agreement on pairs of unequal gold rewards (`measured`), and the share of these pairs
        that the first labeler orders as the gold reward does (`gold_right`).
    """
    gold = _gold(items, completions)
    if temperature is None:
        temperature = _noise(gold, agreement)
    first, second = (random.Random(f"{seed}/labeler/{who}") for who in "ab")
    ranked: list[list[int]] = []
    same: list[bool] = []
    right: list[bool] = []
    prompts: list[int] = []
    for number, rewards in enumerate(gold):
        ranks = rank(rewards, temperature, first), rank(rewards, temperature, second)
        ranked.append(ranks[0])
        for a, b in itertools.combinations(range(len(rewards)), 2):
            if rewards[a] != rewards[b]:
                chose = [order[a] < order[b] for order in ranks]
                same.append(chose[0] == chose[1])
                right.append(chose[0] == (rewards[a] > rewards[b]))
                prompts.append(number)
    report: dict[str, Any] = {"asked": agreement, "measured": None, "pairs": len(same)}
    if same:
        # A model that knew the gold reward would score gold_right, which exceeds the agreement.
        report |= measured(same, prompts) | {"gold_right": sum(right) / len(right)}
    return ranked, report


def measured(same: Sequence[bool], prompts: Sequence[Any]) -> dict[str, Any]:
    """Return the share of pairs on which two labelers agree, with its interval by prompt."""
    share = share_interval(same, prompts)
    return {
        "measured": share["value"],
        "low": share["low"],
        "high": share["high"],
        "pairs": share["n"],
    }


def judged(
    habit: str,
    rewards: Sequence[float],
    temperature: float,
    rng: random.Random,
    order: Sequence[int],
    judge: Sequence[float] = (),
) -> list[int]:
    """Return the ranks, 1 = best, that a labeler of this habit gives.

    Args:
        habit: `honest` ranks as `rank` does, `liar` turns that around, `spammer` does not read,
            `left` takes the order on the screen, `copy` the order of `judge`.
        order: `order[i]` is the answer that was shown in place i.
        judge: Scores of a judge; the highest is the best.
    """
    if habit == "spammer":
        return rng.sample(range(1, len(rewards) + 1), len(rewards))
    if habit == "left":
        return [1 + list(order).index(answer) for answer in range(len(rewards))]
    scores = list(judge if habit == "copy" else rewards)
    if habit == "copy":
        return [1 + sum(other > score for other in scores) for score in scores]
    ranks = rank(scores, temperature, rng)
    worse = [1 + sum(other > one for other in ranks) for one in ranks]
    return worse if habit == "liar" else ranks
