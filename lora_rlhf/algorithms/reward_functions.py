# SPDX-License-Identifier: Apache-2.0
"""Reward functions with TRL's signature: reward model, gold checker, penalty for a missing eos."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset

from lora_rlhf.data.closed_world import checkers
from lora_rlhf.models.backbone import Backbone
from lora_rlhf.recipe.schema import Recipe
from lora_rlhf.training.reward import ensemble

from . import custom_reward

RewardFunction = Callable[..., list[float]]


def of_recipe(
    recipe: Recipe, backbone: Backbone, prompts: Dataset
) -> tuple[list[RewardFunction], list[float]]:
    """Build the reward functions and their weights; a function of weight 0 is only logged."""
    spread: list[float] = []

    def model(
        completion_ids: Any, prompt_ids: Any, trunk_states: Any = None, **_: Any
    ) -> list[float]:
        episodes = list(zip(prompt_ids, completion_ids, strict=True))
        scores = ensemble.scores(backbone, episodes, recipe.reward, states=trunk_states)
        spread[:] = scores.std
        return scores.rewards

    def disagreement(**_: Any) -> list[float]:
        return list(spread)  # of the episodes that `model` has just scored

    def gold(completions: Any, item: Any, **_: Any) -> list[float]:
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        return [
            checkers.check(checkers.Item.from_dict(json.loads(i)), text).reward
            for i, text in zip(item, texts, strict=True)
        ]

    def held_out(
        completion_ids: Any, prompt_ids: Any, trunk_states: Any = None, **_: Any
    ) -> list[float]:
        episodes = list(zip(prompt_ids, completion_ids, strict=True))
        [scores] = ensemble.member_scores(backbone, episodes, ["held_out"], states=trunk_states)
        return [float(score) for score in scores]

    own = custom_reward.load(recipe)
    functions: list[RewardFunction] = [own or (gold if recipe.ppo.reward == "gold" else model)]
    if recipe.ppo.reward == "model" and len(ensemble.roles(recipe.reward)) > 1:
        functions.append(disagreement)
    if recipe.ppo.reward != "gold" and has_checker(prompts):
        functions.append(gold)
    if backbone.has("held_out") and recipe.ppo.watch != "off":
        functions.append(held_out)
    return functions, [1.0] + [0.0] * (len(functions) - 1)


def scores(
    recipe: Recipe,
    backbone: Backbone,
    rows: Sequence[Mapping[str, Any]],
    episodes: Sequence[tuple[Sequence[int], Sequence[int]]],
    size: int,
) -> list[float]:
    """Score answers by the reward model, or by the recipe's own function.

    Args:
        rows: The row of each episode: its `prompt`, text or messages, and other columns.
        episodes: Ids of each prompt and its answer.
        size: Rows that the reward model scores at once.
    """
    if (function := custom_reward.load(recipe)) is None:
        pairs = [(list(prompt), list(answer)) for prompt, answer in episodes]
        return ensemble.scores(backbone, pairs, recipe.reward, size).rewards
    prompts = [row["prompt"] for row in rows]
    columns = {name: [row.get(name) for row in rows] for name in rows[0] if name != "prompt"}
    texts = [backbone.decode(list(answer)) for _, answer in episodes]
    completions = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    ids = [list(answer) for _, answer in episodes]
    given = {"prompts": prompts, "completions": completions, "completion_ids": ids}
    return function(**columns, **given)


def eos_penalty(backbone: Backbone, penalty: float) -> RewardFunction:
    """Build PPO's penalty for a missing eos as a reward function of other algorithms."""
    ends = set(backbone.eos_ids)

    def missing_eos(completion_ids: Any, **_: Any) -> list[float]:
        return [0.0 if ids and ids[-1] in ends else -penalty for ids in completion_ids]

    return missing_eos


def has_checker(prompts: Dataset) -> bool:
    """Check that every prompt has a task item, whose checker gives the gold reward."""
    return "item" in prompts.column_names and all(prompts["item"])
