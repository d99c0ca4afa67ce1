# SPDX-License-Identifier: Apache-2.0
"""The PPO stage: arguments, roles, entry of the record, saved adapters."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import set_seed

from lora_rlhf.algorithms import custom_reward, policy_stage, reward_functions
from lora_rlhf.errors import RecipeError
from lora_rlhf.models import fused_layers
from lora_rlhf.models.backbone import Backbone
from lora_rlhf.recipe import trl_args
from lora_rlhf.recipe.schema import Recipe
from lora_rlhf.training.fit import fit
from lora_rlhf.training.stage_context import StageContext
from lora_rlhf.training.trl_config import PPOConfig, build, effective, trainer_args

from .ppo_trainer import PPOTrainer
from .ptx import TextMix

_DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "steps_per_generation": 4,
    "num_iterations": 1, "num_generations": 1, "learning_rate": 5e-5, "adam_beta1": 0.9,
    "adam_beta2": 0.95, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 10,
    "max_grad_norm": 1.0, "epsilon": 0.2, "temperature": 1.0, "max_completion_length": 128,
    "top_k": 0, "top_p": 1.0, "disable_dropout": True, "beta": 0.0,
}  # fmt: skip

_MAX_EPOCHS = 4  # passes over one rollout: 1 in InstructGPT, 4 in 2403.17031

_CAP = "vllm_importance_sampling_clip_max"

_UNFILTERED: dict[str, tuple[Any, ...]] = {
    "top_k": (0, None), "top_p": (1, None), "min_p": (None, 0), "repetition_penalty": (1, None),
    "generation_kwargs": (None,),
}  # fmt: skip
"""Sampling keys, and their values that leave the distribution unchanged."""

_READ = {
    "per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation",
    "num_iterations", "num_generations", "max_completion_length",
    *_UNFILTERED, "learning_rate", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay",
    "optim", "optim_args", "optim_target_modules", "lr_scheduler_type", "lr_scheduler_kwargs",
    "warmup_steps", "max_grad_norm", "epsilon", "epsilon_high", "temperature", "shuffle_dataset",
    "cache_implementation", "use_transformers_continuous_batching",
    "transformers_continuous_batching_config", "dataloader_num_workers",
    "dataloader_persistent_workers", "dataloader_prefetch_factor", "full_determinism", "tf32",
    "torch_empty_cache_steps", _CAP, "log_level", "project",
    "trackio_space_id",
}  # fmt: skip
"""Keys of GRPO's config that PPO reads; the others belong to GRPO's losses and rollouts."""

_INSTEAD = {
    "max_steps": "use ppo.updates", "num_train_epochs": "use ppo.updates",
    "logging_steps": "leave it out: every update is logged",
    "generation_batch_size": "use per_device_train_batch_size and steps_per_generation",
    "disable_dropout": "leave it out: dropout is off", "entropy_coef": "use ppo.entropy_coef",
    "use_vllm": "leave it out: PPO samples with transformers",
}  # fmt: skip


def run(
    context: StageContext,
    args: PPOConfig,
    prompts: Dataset,
    text: list[list[int]] | None = None,
) -> None:
    """Optimise the policy against the reward; saves `adapters/policy` and `adapters/value`.

    With `ppo.value: head` there is no value adapter.

    Args:
        prompts: Column `prompt`, and `item` where a task's gold checker is used or logged.
        text: Token ids of each text for PPO-ptx.

    Raises:
        IdentityError: A start-up identity does not hold.
    """
    recipe, backbone, record, progress = context
    with record.stage("ppo") as entry:
        set_seed(recipe.seed)
        start_roles(backbone, recipe)
        functions, args.reward_weights = reward_functions.of_recipe(recipe, backbone, prompts)
        per_update = policy_stage.steps_per_update(args)
        mix = None
        if text and recipe.ppo.ptx_coef:
            pad = backbone.tokenizer.pad_token_id
            mix = TextMix(text, args.per_device_train_batch_size, recipe.seed, pad)
        build_trainer = functools.partial(
            PPOTrainer,
            backbone,
            args=args,
            ppo=recipe.ppo,
            reward_funcs=functions,
            train_dataset=prompts,
            progress=progress,
            text=mix,
        )
        with backbone.training("policy", "value"):
            fused = fused_layers.layers(backbone)
            trainer, result = fit(context, build_trainer, "ppo", unit=per_update, around=fused)
        updates = result.global_step // per_update
        entry |= {
            "updates": updates,
            **custom_reward.describe(recipe),
            "kl_coef": recipe.ppo.kl_coef,
            "episodes": updates * args.generation_batch_size,
            "args": effective(args),
            "optimizer_steps": result.global_step,
            "identities": trainer.identities,
            **({"steering": trainer.controller.entry} if trainer.controller.entry else {}),
        }
        entry |= policy_stage.last_kl(record, "ppo")
        entry["adapter_sha256"] = context.save_adapter("policy")
        if backbone.has("value"):
            entry["value_adapter_sha256"] = context.save_adapter("value")


def start_roles(backbone: Backbone, recipe: Recipe) -> None:
    """Start the policy as a copy of SFT, and the value as one of the reward model or SFT."""
    backbone.copy_role("reference", "policy")
    backbone.drop_value()
    scored = recipe.ppo.reward == "model"
    if recipe.ppo.value == "head":
        backbone.add_value_head("reward" if scored else None)
    else:
        backbone.add_role("value", copy_from="reward" if scored else "reference")


def arguments(recipe: Recipe, out: Path) -> PPOConfig:
    """Build TRL's config of this stage; `updates` becomes `max_steps`.

    Raises:
        RecipeError: Batch sizes do not divide, sampling changes the distribution, or PPO does not
            read a key.
    """
    merged = trainer_args(recipe, out, "ppo", _DEFAULTS, recipe.ppo.args)
    known = {field.name for field in dataclasses.fields(PPOConfig)}
    for key in recipe.ppo.args:
        if key in known - _READ:
            raise RecipeError(
                f"ppo.args.{key} would do nothing", remedy=_INSTEAD.get(key, "leave it out")
            )
    if merged["num_iterations"] > _MAX_EPOCHS:
        raise RecipeError(
            f"ppo.args.num_iterations: {merged['num_iterations']}",
            expected=f"at most {_MAX_EPOCHS} passes over a rollout",
            remedy="raise ppo.updates instead: fresh episodes teach more than old ones",
        )
    if not merged["max_grad_norm"] > 0:
        raise RecipeError(
            f"ppo.args.max_grad_norm: {merged['max_grad_norm']!r}", expected="a number above 0"
        )
    cap = recipe.ppo.args.get(_CAP, 3.0)
    numeric = isinstance(cap, int | float)
    if _CAP in recipe.ppo.args and not (recipe.ppo.max_staleness and numeric and cap >= 1):
        raise RecipeError(
            f"ppo.args.{_CAP}: {cap!r}",
            expected="a number from 1, beside ppo.max_staleness: 1, whose weights it cuts off",
        )
    steps = policy_stage.rollout_steps("ppo", merged, recipe.ppo.updates)
    for key, allowed in _UNFILTERED.items():
        if merged.get(key) not in allowed:
            raise RecipeError(
                f"ppo.args.{key}: {merged[key]!r} changes the distribution that is sampled",
                expected="plain sampling: log-probs are those of the unchanged distribution",
                remedy="leave it out",
            )
    # Other algorithms have no value to warm up.
    if recipe.algorithm == "ppo" and recipe.ppo.value_warmup_updates >= recipe.ppo.updates:
        raise RecipeError(
            f"ppo.updates is {recipe.ppo.updates}, ppo.value_warmup_updates "
            f"{recipe.ppo.value_warmup_updates}",
            expected="more updates than warm-up updates, in which only the value learns",
            remedy="raise ppo.updates, or lower ppo.value_warmup_updates (0: none)",
        )
    return build("ppo", PPOConfig, {**merged, **steps})


_BUDGET = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "adam_beta1",
    "adam_beta2", "lr_scheduler_type", "warmup_steps", "max_grad_norm", "weight_decay",
    "disable_dropout",
)  # fmt: skip
"""Arguments that other algorithms take from PPO unless their own `args:` set them."""

_ROLLOUT_BUDGET = (
    "steps_per_generation", "num_iterations", "epsilon", "temperature", "max_completion_length",
    "top_k", "top_p",
)  # fmt: skip


def budget(recipe: Recipe, out: Path, *, rollouts: bool) -> dict[str, Any]:
    """Return PPO's arguments that another algorithm shares; `rollouts` adds those on sampling.

    Raises:
        RecipeError: `ppo.args` are invalid.
    """
    config = arguments(recipe, out)
    names = _BUDGET + (_ROLLOUT_BUDGET if rollouts else ())
    return {name: getattr(config, name) for name in names}


def completion_limit(recipe: Recipe, algorithm: str) -> int:
    """Return the maximum number of tokens of a completion in an algorithm's rollouts.

    Raises:
        RecipeError: It is not a whole number from 1.
    """
    own = getattr(getattr(recipe, algorithm), "args", {})
    args = {**_DEFAULTS, **recipe.ppo.args, **own}
    trl_args.refuse(algorithm, {"max_completion_length": args["max_completion_length"]})
    return int(args["max_completion_length"])
