# SPDX-License-Identifier: Apache-2.0
"""The work of each training of a run, in forward passes of a row, for the time that is left."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from lora_rlhf.algorithms.trainer_configs import TrainerConfigs
from lora_rlhf.recipe.schema import Recipe

_TRAIN, _SAMPLE = 3, 2
"""Forward passes that take as long as a training step and as sampling one completion, roughly."""


def work(
    recipe: Recipe, configs: TrainerConfigs, stages: Collection[str], rows: dict[str, int]
) -> dict[str, float]:
    """Return training -> work, in the order of the run.

    Args:
        rows: Training rows of `demonstrations` and `comparisons`, and rows of `evaluate`.
    """
    sampled = sum(s.n * s.completions for s in recipe.data.comparisons if s.task)
    compared = sampled or 2 * rows.get("comparisons", 0)
    counts: dict[str, float] = {}
    if "sft" in stages and not recipe.sft.start:
        counts["sft"] = _TRAIN * _seen(configs.sft, rows.get("demonstrations", 0))
    if "reward" in stages:
        counts |= {"sampling": _SAMPLE * sampled} if sampled else {}
        trained = {
            r: a for r, a in configs.reward.items() if r != "reward" or not recipe.reward.start
        }
        counts |= {role: _TRAIN * _seen(args, compared) for role, args in trained.items()}
    if recipe.algorithm in stages and recipe.algorithm != "best_of_n":
        args = configs.policy
        if recipe.algorithm == "dpo":
            counts["dpo"] = (_TRAIN + 1) * _seen(args, compared)
        else:
            passes = _TRAIN * args.num_iterations * (2 if recipe.algorithm == "ppo" else 1)
            steps = args.max_steps * args.gradient_accumulation_steps / args.num_iterations
            episodes = steps * args.per_device_train_batch_size
            counts[recipe.algorithm] = episodes * (_SAMPLE + _TRAIN + passes)
    if "evaluate" in stages:
        n = recipe.best_of_n.n + 2 if recipe.algorithm == "best_of_n" else 3
        counts["evaluate"] = n * rows.get("evaluate", 0) * (_SAMPLE + _TRAIN)
    return counts


def _seen(args: Any, rows: int) -> float:
    """Return the rows that a training sees in all its epochs."""
    steps = args.max_steps * args.per_device_train_batch_size * args.gradient_accumulation_steps
    return float(steps if args.max_steps > 0 else rows * args.num_train_epochs)
