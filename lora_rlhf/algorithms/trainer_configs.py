# SPDX-License-Identifier: Apache-2.0
"""TRL's config of every training in a recipe, built before any folder or model is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from lora_rlhf._trl import RewardConfig, SFTConfig
from lora_rlhf.recipe.schema import Recipe
from lora_rlhf.recipe.stage_keys import has_reward_model
from lora_rlhf.training import sft
from lora_rlhf.training.reward import reward_stage

from . import dpo, grpo_rloo
from .ppo import ppo_stage


class TrainerConfigs(NamedTuple):
    """The configs of one run; `reward` by role, empty where no reward model is trained."""

    sft: SFTConfig
    reward: dict[str, RewardConfig]
    policy: Any


def build(recipe: Recipe, out: Path) -> TrainerConfigs:
    """Build the configs of a run; best of n, which trains nothing, gets PPO's.

    Raises:
        RecipeError: `args:` of a stage cannot be used.
    """
    modules: dict[str, Any] = {"ppo": ppo_stage, "best_of_n": ppo_stage, "dpo": dpo}
    return TrainerConfigs(
        sft.arguments(recipe, out),
        reward_stage.arguments(recipe, out) if has_reward_model(recipe) else {},
        modules.get(recipe.algorithm, grpo_rloo).arguments(recipe, out),
    )
