# SPDX-License-Identifier: Apache-2.0
"""Preflight: reject recipes and launches that cannot finish."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from lora_rlhf.algorithms import best_of_n, vllm_rollouts
from lora_rlhf.algorithms import trainer_configs as configs
from lora_rlhf.errors import RecipeError
from lora_rlhf.recipe import trl_args
from lora_rlhf.recipe.schema import Recipe
from lora_rlhf.recipe.stage_keys import ALGORITHMS
from lora_rlhf.runtime import environment
from lora_rlhf.training import trl_config


def check_launch(recipe: Recipe, stages: Collection[str]) -> None:
    """Reject launchers, pushes of adapters that are not trained, and a missing rollout server.

    Raises:
        SetupError: A variable of the environment asks for several processes or another engine, or
            the rollout server does not answer.
        RecipeError: `hub:` names a repository for an adapter that is not trained, or an algorithm
            other than PPO has a rollout server.
        UsageError: The rollout server was started for another recipe.
    """
    environment.settle()
    if (server := recipe.ppo.rollout_server) and recipe.algorithm in stages:
        if recipe.algorithm != "ppo":
            raise RecipeError(
                f"ppo.rollout_server is set, but {ALGORITHMS[recipe.algorithm]} samples here",
                remedy="leave it out, or use algorithm: ppo",
            )
        vllm_rollouts.RolloutServer(server).check(recipe)
    trained = {"best_of_n": set(), "ppo": {"policy", "value"}}.get(recipe.algorithm, {"policy"})
    trained -= {"value"} if recipe.ppo.value == "head" else set()
    for role in ("policy", "value") if "card" in stages else ():
        if getattr(recipe.hub, role) and role not in trained:
            raise RecipeError(
                f"hub.{role} is set, and {ALGORITHMS[recipe.algorithm]} trains no {role} adapter",
                remedy=f"leave it out, or --set hub.{role}=null",
            )


def trainer_configs(recipe: Recipe, out: Path, stages: Collection[str]) -> configs.TrainerConfigs:
    """Build the TRL configs of these stages before a folder is made or the backbone loaded.

    Raises:
        RecipeError: `args:` of a stage, or `report_to`, are invalid.
        SetupError: A tracker is not installed.
    """
    trl_args.check(recipe, stages)
    trl_config.check_trackers(recipe.report_to)
    if recipe.algorithm == "best_of_n" and "evaluate" in stages:
        best_of_n.check(recipe)
    return configs.build(recipe, out, stages)
