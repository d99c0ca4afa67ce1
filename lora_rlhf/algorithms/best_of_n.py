# SPDX-License-Identifier: Apache-2.0
"""Best of n: choose the SFT sample with the highest reward among n, without training.

Sources: Stiennon et al. 2020 (2009.01325, appendix G.3) for KL = log n - (n - 1)/n, shown to be an
upper bound, not an equality, by Beirami et al. (2401.01879).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lora_rlhf.errors import RecipeError
from lora_rlhf.estimates import Estimate
from lora_rlhf.models.backbone import Backbone
from lora_rlhf.recipe.schema import Recipe
from lora_rlhf.runs.record import Record

from . import custom_reward, reward_functions


def best_of_n_kl(n: int) -> float:
    """KL(best of n || SFT) in nats: log n - (n - 1) / n; an upper bound where samples repeat."""
    return math.log(n) - (n - 1) / n


def analytic(value: float) -> Estimate:
    """Return a computed number as an estimate without an interval, with n = 0."""
    return {"value": value, "low": None, "high": None, "n": 0}


def check(recipe: Recipe) -> None:
    """Reject greedy decoding, which gives n equal answers.

    Raises:
        RecipeError: The evaluation's temperature is 0.
    """
    if recipe.evaluate.temperature == 0:
        raise RecipeError(
            "algorithm: best_of_n with evaluate.temperature: 0",
            expected="samples that differ",
            remedy="set evaluate.temperature to 1",
        )


def run(recipe: Recipe, record: Record) -> None:
    """Write the stage's entry of the record; nothing is trained."""
    n = recipe.best_of_n.n
    with record.stage("best_of_n") as entry:
        entry |= {
            "n": n,
            **custom_reward.describe(recipe),
            "kl_bound": analytic(best_of_n_kl(n)),
            "samples_per_answer": n,
        }


def choose(
    backbone: Backbone,
    prompts: Sequence[Sequence[int]],
    recipe: Recipe,
    *,
    given: Sequence[Any] = (),
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> list[list[int]]:
    """Return, for each prompt, the first of the highest-scored completions among n SFT samples.

    Args:
        given: Each prompt's row as the data has it, for a reward function.
    """
    n, size = recipe.best_of_n.n, recipe.evaluate.batch_size
    repeated = [list(prompt) for prompt in prompts for _ in range(n)]
    samples = backbone.generate(
        repeated,
        "reference",
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed + 7_919_000,  # no random numbers shared with SFT's own answers
        batch_size=size,
    )
    rows = [row for row in given for _ in range(n)]
    pairs = list(zip(repeated, samples, strict=True))
    rewards = reward_functions.scores(recipe, backbone, rows, pairs, size)
    best = []
    for start in range(0, len(samples), n):
        group = rewards[start : start + n]
        best.append(samples[start + group.index(max(group))])
    return best
