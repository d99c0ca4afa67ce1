# SPDX-License-Identifier: Apache-2.0
"""Preflight: reject recipes and launches that cannot finish."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from lora_rlhf.algorithms import best_of_n
from lora_rlhf.algorithms import trainer_configs as configs
from lora_rlhf.errors import RecipeError, SetupError
from lora_rlhf.recipe import trl_args
from lora_rlhf.recipe.schema import Recipe
from lora_rlhf.recipe.stage_keys import ALGORITHMS
from lora_rlhf.training import trl_config

_PROCESSES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
"""Variables in which launchers give the number of processes, which accelerate would use."""


def check_launch(recipe: Recipe, stages: Collection[str]) -> None:
    """Reject several processes, and pushes of adapters that the run does not train.

    Raises:
        SetupError: Several processes were launched.
        RecipeError: `hub:` names a repository for an adapter that is not trained.
    """
    for name in _PROCESSES:
        if (count := os.environ.get(name, "1")) not in ("", "0", "1"):
            raise SetupError(
                f"this is one of {count} processes ({name})",
                expected="one process: all roles share one backbone on one GPU",
                remedy="start `lora-rlhf` itself, without torchrun, accelerate launch or mpirun",
            )
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
