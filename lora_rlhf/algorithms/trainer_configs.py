# SPDX-License-Identifier: Apache-2.0
"""TRL's config of every training in a recipe, built before any folder or model is made."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from lora_rlhf._trl import RewardConfig
from lora_rlhf.recipe.schema import Recipe
from lora_rlhf.recipe.stage_keys import has_reward_model
from lora_rlhf.training import sft
from lora_rlhf.training.reward import reward_stage

from . import dpo, grpo_rloo
from .ppo import ppo_stage


class TrainerConfigs(NamedTuple):
    """The configs of one run; `reward` by role, empty where no reward model is trained.

    None for a stage that was not asked for.
    """

    sft: Any
    reward: dict[str, RewardConfig]
    policy: Any


def build(recipe: Recipe, out: Path, stages: Collection[str]) -> TrainerConfigs:
    """Build the configs of these stages; best of n, which trains nothing, gets PPO's.

    Raises:
        RecipeError: `args:` of a stage cannot be used.
    """
    modules: dict[str, Any] = {"ppo": ppo_stage, "best_of_n": ppo_stage, "dpo": dpo}
    policy = modules.get(recipe.algorithm, grpo_rloo)
    reward = "reward" in stages and has_reward_model(recipe)
    return TrainerConfigs(
        sft.arguments(recipe, out) if "sft" in stages else None,
        reward_stage.arguments(recipe, out) if reward else {},
        policy.arguments(recipe, out) if recipe.algorithm in stages else None,
    )
