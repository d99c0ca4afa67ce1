# SPDX-License-Identifier: Apache-2.0
"""Steps that the stages of all algorithms share: checks of arguments and prompts, loading."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import Dataset

from lora_rlhf.errors import DataError, RecipeError
from lora_rlhf.models import adapters
from lora_rlhf.models.backbone import Backbone
from lora_rlhf.recipe.schema import Recipe
from lora_rlhf.recipe.stage_keys import ALGORITHMS
from lora_rlhf.runs.record import Record

from .reward_functions import has_checker


def check(recipe: Recipe, args: Any, prompts: Dataset) -> None:
    """Check the prompts of an algorithm with rollouts before anything is trained.

    Raises:
        DataError: Fewer prompts than one rollout takes, or no checker for a gold reward.
    """
    algorithm = recipe.algorithm
    needed = args.generation_batch_size // args.num_generations
    if len(prompts) < needed:
        key = "num_generations" if algorithm != "ppo" else "args.num_generations"
        raise DataError(
            f"too few prompts: {len(prompts)} are left for training, but one "
            f"{ALGORITHMS[algorithm]} rollout needs {needed}",
            expected=f"at least {needed} (per_device_train_batch_size "
            f"{args.per_device_train_batch_size} x steps_per_generation "
            f"{args.steps_per_generation} / num_generations {args.num_generations})",
            remedy="give more prompts, lower ppo.args.steps_per_generation, or raise "
            f"{algorithm}.{key}",
        )
    if recipe.ppo.reward == "gold" and not has_checker(prompts):
        raise DataError(
            "ppo.reward is gold, and these prompts have no checker",
            expected="prompts of `task: closed-world`",
            remedy="set ppo.reward to model",
        )


def rollout_steps(algorithm: str, args: Mapping[str, Any], updates: int) -> dict[str, Any]:
    """Return TRL's arguments for a number of updates, each of one rollout and logged once.

    Raises:
        RecipeError: An optimizer step would take micro-batches of two rollouts.
    """
    steps, window = args["steps_per_generation"], args["gradient_accumulation_steps"]
    if steps % window:
        raise RecipeError(
            f"{algorithm}.args: steps_per_generation {steps} and gradient_accumulation_steps "
            f"{window}",
            expected="the second divides the first: an optimizer step stays inside one rollout",
        )
    per_update = args["num_iterations"] * steps // window
    return {
        "max_steps": updates * per_update,
        "logging_steps": per_update,
        "logging_first_step": False,
    }


def steps_per_update(args: Any) -> int:
    """Count the optimizer steps that one rollout is used for."""
    return int(args.num_iterations * args.steps_per_generation // args.gradient_accumulation_steps)


def load(backbone: Backbone, record: Record) -> None:
    """Load the policy of the finished stage; nothing after the stage reads the value."""
    adapters.load_role(backbone, "policy", record.adapter("policy"))


def last_kl(record: Record, stage: str) -> dict[str, float]:
    """Return `kl_last` for a stage's entry, where its log has one."""
    lines = record.metrics(stage)
    return {"kl_last": lines[-1]["kl/sequence"]} if lines and "kl/sequence" in lines[-1] else {}
