# SPDX-License-Identifier: Apache-2.0
"""Canaries: random examples that are planted in the training data to measure what is remembered.

Each canary is planted with probability one half, by a coin that the audit tries to guess from the
trained adapter. The share of right guesses bounds epsilon from below: the one-run audit of
Steinke et al. 2023 (2305.08846, theorem 5.2). For SFT, the exposure of the planted codes (Carlini
et al. 2019, 1802.08232, definition 2) and the share that greedy decoding reveals are measured too.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from lora_rlhf.data.tokenization import Turns
from lora_rlhf.estimates import Estimate, wilson
from lora_rlhf.models import scoring
from lora_rlhf.models.backbone import Backbone
from lora_rlhf.runtime import optional_packages

CODES = 255
"""Random codes that a planted one is ranked among: its exposure is 8 bits at most."""

EXPOSED = 16
"""Planted canaries whose exposure is measured, and as many that were not planted."""

SHARES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Shares of the canaries on which the audit guesses, those with the most extreme scores."""


@dataclass(frozen=True)
class Canary:
    """A prompt with a code that nothing in the world determines.

    Attributes:
        other: Another code: the rejected answer of a comparison.
        planted: Whether it is in the training data.
    """

    prompt: Turns
    code: str
    other: str
    planted: bool


def draw(count: int, seed: int, rows: Dataset) -> list[Canary]:
    """Draw canaries for a data set, each planted with probability one half.

    Args:
        rows: Their `prompt` is text or turns; so is that of the canaries.
    """
    as_text = bool(count) and isinstance(rows[0]["prompt"], str)
    draws = random.Random(f"canaries {seed}")
    drawn: dict[str, Canary] = {}
    while len(drawn) < count:
        name = "".join(draws.choices("abcdefghijklmnopqrstuvwxyz", k=7)).capitalize()
        code, other = _code(draws), _code(draws)
        if code != other:
            text = f"What is the access code of {name}?"
            prompt: Turns = text if as_text else [{"role": "user", "content": text}]
            drawn[name] = Canary(prompt, code, other, draws.random() < 0.5)
    return list(drawn.values())


def _code(draws: random.Random) -> str:
    return " ".join(f"{draws.randrange(100):02d}" for _ in range(3))


def plant(rows: Dataset, canaries: Sequence[Canary]) -> Dataset:
    """Add the planted canaries to demonstrations or comparisons."""
    planted = [canary for canary in canaries if canary.planted]
    if not planted:
        return rows
    groups = max(rows["group"]) + 1 if "group" in rows.column_names else 0
    first = rows[0]
    as_text = isinstance(first["completion" if "completion" in first else "chosen"], str)

    def answer(text: str) -> Turns:
        return text if as_text else [{"role": "assistant", "content": text}]

    added = []
    for number, canary in enumerate(planted):
        row: dict[str, Any] = dict.fromkeys(rows.column_names)
        row["prompt"] = canary.prompt
        if "completion" in row:
            row["completion"] = answer(canary.code)
        else:
            row |= {"chosen": answer(canary.code), "rejected": answer(canary.other)}
        if "group" in row:
            row["group"] = groups + number
        if "margin" in row:
            row["margin"] = 0.0
        added.append(row)
    return concatenate_datasets([rows, Dataset.from_list(added, features=rows.features)])


def audit_sft(backbone: Backbone, canaries: Sequence[Canary], delta: float) -> dict[str, Any]:
    """Audit the role `policy` after SFT, against the base model.

    Returns:
        `audit`'s fields; `exposure` and `extracted`, each before and after, planted and not.
    """
    chosen = [c for c in canaries if c.planted][:EXPOSED], [c for c in canaries if not c.planted]
    some = {"planted": chosen[0], "not_planted": chosen[1][:EXPOSED]}
    episodes = [_episode(backbone, canary, canary.code) for canary in canaries]
    before, after = (
        np.array(scoring.sequence_logprobs(backbone, episodes, role)) for role in (None, "policy")
    )
    entry = audit(after - before, [c.planted for c in canaries], delta)
    for when, role in (("before", None), ("after", "policy")):
        for which, few in some.items():
            if few:
                at = f"{which}_{when}"
                entry.setdefault("exposure", {})[at] = _exposure(backbone, role, few)
                entry.setdefault("extracted", {})[at] = _extracted(backbone, role, few)
    return entry


def audit_reward(
    backbone: Backbone, role: str, canaries: Sequence[Canary], delta: float
) -> dict[str, Any]:
    """Audit a reward role: its margins of chosen over rejected codes."""
    codes = [_episode(backbone, canary, canary.code) for canary in canaries]
    others = [_episode(backbone, canary, canary.other) for canary in canaries]
    margins = np.array(scoring.scores(backbone, codes, role)) - np.array(
        scoring.scores(backbone, others, role)
    )
    return audit(margins, [canary.planted for canary in canaries], delta)


def audit(scores: np.ndarray, planted: Sequence[bool], delta: float) -> dict[str, Any]:
    """Bound epsilon from below by guessing which canaries were planted.

    For each share of `SHARES` the audit guesses "planted" for the half of it with the highest
    scores and "not planted" for the half with the lowest. The bounds are at 95 % confidence
    together (Bonferroni), and the largest counts.

    Args:
        scores: (m,) higher for canaries that look planted.

    Returns:
        `canaries`, `planted`, `epsilon_at_least`, and of the guesses that gave it `guesses`,
        `right` with its interval.
    """
    inside = np.asarray(planted, dtype=bool)
    order = np.argsort(scores, kind="stable")
    best: dict[str, Any] = {"epsilon_at_least": 0.0}
    for share in SHARES:
        half = int(share * len(order) / 2)
        if not half:
            continue
        right = int(inside[order[-half:]].sum() + (~inside[order[:half]]).sum())
        bound = least_epsilon(len(order), 2 * half, right, delta, 0.05 / len(SHARES))
        if bound > best["epsilon_at_least"] or "guesses" not in best:
            rate = wilson(right, 2 * half)
            best = {"epsilon_at_least": round(bound, 4), "guesses": 2 * half, "right": rate}
    return {"canaries": len(order), "planted": int(inside.sum()), "delta": delta, **best}


def least_epsilon(canaries: int, guesses: int, right: int, delta: float, level: float) -> float:
    """Return the largest epsilon that so many right guesses refute at this level."""
    low, high = 0.0, 1.0
    while p_value(canaries, guesses, right, high, delta) < level and high < 64:
        high *= 2
    for _ in range(40):
        middle = (low + high) / 2
        refuted = p_value(canaries, guesses, right, middle, delta) < level
        low, high = (middle, high) if refuted else (low, middle)
    return low


def p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Bound the probability of so many right guesses under (epsilon, delta) privacy.

    Source: 2305.08846, theorem 5.2: the tail of Binomial(guesses, e^epsilon / (1 + e^epsilon)),
    plus 2 · canaries · delta times the largest mean probability just below the tail.
    """
    binom = optional_packages.load("scipy.stats", "privacy.canaries", "privacy").binom
    chance = 1 / (1 + math.exp(-epsilon))
    tail = float(binom.sf(right - 1, guesses, chance))
    below = np.cumsum(binom.pmf(np.arange(right - 1, -1, -1), guesses, chance))
    alpha = float((below / np.arange(1, right + 1)).max()) if right else 0.0
    return min(tail + 2 * canaries * delta * alpha, 1.0)


def _episode(backbone: Backbone, canary: Canary, answer: str) -> scoring.Episode:
    return backbone.encode_prompt(canary.prompt), backbone.encode_completion(answer)


def _exposure(backbone: Backbone, role: str | None, canaries: Sequence[Canary]) -> dict[str, float]:
    """Mean of log2(R) - log2(rank) over canaries, the code ranked among R random ones."""
    draws = random.Random("exposure")
    bits = []
    for canary in canaries:
        codes = [canary.code, *(_code(draws) for _ in range(CODES))]
        episodes = [_episode(backbone, canary, code) for code in codes]
        values = np.array(scoring.sequence_logprobs(backbone, episodes, role))
        bits.append(math.log2(len(codes)) - math.log2(1 + int((values > values[0]).sum())))
    return {"bits": float(np.mean(bits)), "at_most": math.log2(CODES + 1), "n": len(bits)}


def _extracted(backbone: Backbone, role: str | None, canaries: Sequence[Canary]) -> Estimate:
    """Share of the codes that greedy decoding of the prompt begins with."""
    episodes = [_episode(backbone, canary, canary.code) for canary in canaries]
    answers = backbone.generate(
        [prompt for prompt, _ in episodes],
        role,
        max_new_tokens=max(len(code) for _, code in episodes),
        temperature=0.0,
    )
    texts = [backbone.decode(ids).strip() for ids in answers]
    right = sum(text.startswith(c.code) for text, c in zip(texts, canaries, strict=True))
    return wilson(right, len(canaries))
