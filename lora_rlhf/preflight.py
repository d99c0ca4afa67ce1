# SPDX-License-Identifier: Apache-2.0
"""Preflight: reject recipes and launches that cannot finish."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from lora_rlhf.algorithms import best_of_n, vllm_rollouts
from lora_rlhf.algorithms import trainer_configs as configs
from lora_rlhf.distributed.world import world
from lora_rlhf.errors import RecipeError, SetupError
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
        RecipeError: `hub:` names a repository for an adapter that is not trained, an algorithm
            other than PPO has a rollout server, or a split base another sampler.
        UsageError: The rollout server was started for another recipe.
    """
    environment.settle()
    samplers = ("cache_implementation", "use_transformers_continuous_batching")
    given = [name for name in samplers if recipe.ppo.args.get(name)]
    if recipe.model.shard and given and recipe.algorithm in ("ppo", "grpo", "rloo"):
        raise RecipeError(
            f"ppo.args.{given[0]} is set, and model.shard splits the base between processes",
            expected="our own sampler, which waits for a layer's weights",
            remedy=f"leave {given[0]} out, or model.shard",
        )
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


def check_processes(recipe: Recipe) -> None:
    """Reject a base that is to be split in one process.

    Raises:
        SetupError: `model.shard` is set, and there is one process.
    """
    if recipe.model.shard and world().size == 1:
        raise SetupError(
            "model.shard splits the base between processes, and this run is one process",
            expected="two or more processes; accelerate needs --multi_gpu to start them",
            remedy="start it by torchrun --nproc_per_node 2, or --set model.shard=false",
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
