# SPDX-License-Identifier: Apache-2.0
"""Steps that several algorithms' stages share: arguments, checks of prompts, entries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import Dataset

from lora_rlhf.errors import DataError, RecipeError
from lora_rlhf.recipe.schema import Recipe
from lora_rlhf.recipe.stage_keys import ALGORITHMS
from lora_rlhf.runs.record import Record

from .reward_functions import has_checker


def check(recipe: Recipe, args: Any, prompts: Dataset) -> None:
    """Check the prompts of an algorithm with rollouts before training.

    Raises:
        DataError: There are fewer prompts than one rollout takes, or no checker for a gold reward.
    """
    algorithm = recipe.algorithm
    needed = args.generation_batch_size // args.num_generations
    if len(prompts) < needed:
        own = "steps_per_generation" in getattr(getattr(recipe, algorithm), "args", {})
        section = algorithm if own else "ppo"
        key = "num_generations" if algorithm != "ppo" else "args.num_generations"
        raise DataError(
            f"too few prompts: {len(prompts)} are left for training, but one "
            f"{ALGORITHMS[algorithm]} rollout needs {needed}",
            expected=f"at least {needed} (per_device_train_batch_size "
            f"{args.per_device_train_batch_size} x steps_per_generation "
            f"{args.steps_per_generation} / num_generations {args.num_generations})",
            remedy=f"give more prompts, lower {section}.args.steps_per_generation, or raise "
            f"{algorithm}.{key}",
        )
    if recipe.ppo.reward == "gold" and not has_checker(prompts):
        raise DataError(
            "ppo.reward is gold, and these prompts have no checker",
            expected="prompts of `task: closed-world`",
            remedy="set ppo.reward to model",
        )


def rollout_steps(algorithm: str, args: Mapping[str, Any], updates: int) -> dict[str, Any]:
    """Return TRL's arguments for a number of updates, each one rollout and one log line.

    Raises:
        RecipeError: An optimizer step would span two rollouts.
    """
    steps, window = args["steps_per_generation"], args["gradient_accumulation_steps"]
    if steps % window:
        raise RecipeError(
            f"{algorithm}.args: steps_per_generation {steps} and gradient_accumulation_steps "
            f"{window}",
            expected="steps_per_generation divisible by gradient_accumulation_steps, so that an "
            "optimizer step stays inside one rollout",
        )
    per_update = args["num_iterations"] * steps // window
    return {
        "max_steps": updates * per_update,
        "logging_steps": per_update,
        "logging_first_step": False,
    }


def steps_per_update(args: Any) -> int:
    """Return the number of optimizer steps on one rollout."""
    return int(args.num_iterations * args.steps_per_generation // args.gradient_accumulation_steps)


def last_kl(record: Record, stage: str) -> dict[str, float]:
    """Return `kl_last`, the KL of the last log line, for a stage's entry; empty without one."""
    lines = record.metrics(stage)
    return {"kl_last": lines[-1]["kl/sequence"]} if lines and "kl/sequence" in lines[-1] else {}
