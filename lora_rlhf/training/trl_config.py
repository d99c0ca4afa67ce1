# SPDX-License-Identifier: Apache-2.0
"""What the training stages share: how a recipe's `args:` become a TRL config."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, get_scheduler
from transformers.integrations import integration_utils

from lora_rlhf._trl import GRPOConfig
from lora_rlhf.errors import RecipeError, SetupError, first_line
from lora_rlhf.recipe import trl_args
from lora_rlhf.recipe.schema import Recipe
from lora_rlhf.redaction import hide, safe

_EFFECTIVE = (
    "learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size",
    "gradient_accumulation_steps", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps",
    "optim", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay", "max_grad_norm",
    "max_length", "packing", "center_rewards_coefficient", "label_smoothing",
    "steps_per_generation", "num_generations", "num_iterations", "epsilon", "epsilon_high",
    "temperature", "max_completion_length",
)  # fmt: skip
"""Fields of TRL's configs that decide what a stage computes."""

_OF_GROUPS = ("loss_type", "scale_rewards", "normalize_advantages")
"""Those that PPO, which has a loss of its own, does not read."""

_COMPLAINTS = (TypeError, ValueError, ImportError, NotImplementedError)
"""What libraries raise where an argument does not suit them."""


@dataclasses.dataclass
class PPOConfig(GRPOConfig):
    """GRPO's config, which refuses one completion per prompt; PPO needs no group."""

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
        except ValueError as error:
            # TRL's last check but those of vLLM's importance sampling, which PPO does not use.
            if self.num_generations != 1 or "at least 2 generations" not in str(error):
                raise


def trainer_args(
    recipe: Recipe, out: Path, stage: str, defaults: dict[str, Any], given: dict[str, Any]
) -> dict[str, Any]:
    """Keyword arguments for a stage's TRL config: ours, over-ridden by the recipe's `args:`.

    The backbone's dtype is settled at loading and adapters are float32: no autocast is asked for.

    Args:
        out: The run directory.

    Raises:
        RecipeError: `args:` names a key that has its home elsewhere, or a number out of range.
    """
    trl_args.refuse(stage, given)
    trl_args.check_values(stage, given)
    return {
        "output_dir": str(out / "checkpoints" / stage),
        "seed": recipe.seed,
        "report_to": list(recipe.report_to) or "none",
        "run_name": f"{recipe.name}-{stage}",
        "bf16": False,
        "fp16": False,
        "use_cpu": not torch.cuda.is_available(),
        "activation_checkpointing": recipe.model.gradient_checkpointing,
        "activation_checkpointing_kwargs": {"use_reentrant": False},
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "logging_nan_inf_filter": False,
        "remove_unused_columns": False,
        "adam_epsilon": 1e-5,
        "logging_first_step": True,
        "log_level": "error",
        **({} if stage in ("ppo", "grpo", "rloo") else {"max_length": recipe.data.max_tokens}),
        **defaults,
        **given,
    }


def build(stage: str, config: Any, given: dict[str, Any]) -> Any:
    """A TRL config, with its complaints about `args:` as recipe errors.

    Raises:
        RecipeError: An unknown key or an impossible combination.
    """
    known = frozenset(field.name for field in dataclasses.fields(config) if field.init)
    for key in given:
        if key not in known:
            raise trl_args.unknown(stage, key, known)
    with complaints(stage):
        built = config(**given)
        # One process uses one GPU, whatever is visible: transformers would replicate the backbone.
        built._n_gpu = min(built.n_gpu, 1)
        _try_out(built)
        # What trackers are told of the run: no folder of this machine's user, no secret.
        built.to_dict = functools.partial(_told, built)
        built.run_name, built.project = safe(built.run_name), safe(built.project)
        return built


def _told(args: Any) -> dict[str, Any]:
    found: dict[str, Any] = hide(type(args).to_dict(args))
    return found


def _try_out(args: Any) -> None:
    """Make optimizer and scheduler of nothing: TRL would only do so when a stage has begun."""
    Trainer.get_optimizer_cls_and_kwargs(args)
    get_scheduler(
        args.lr_scheduler_type,
        torch.optim.SGD([torch.zeros(1)], lr=1.0),
        num_warmup_steps=0,
        num_training_steps=2,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )


@contextlib.contextmanager
def complaints(stage: str) -> Iterator[None]:
    """Round the making of a config or a trainer: what libraries refuse is the recipe's to mend.

    Raises:
        RecipeError: In their words.
    """
    try:
        yield
    except _COMPLAINTS as error:
        raise RecipeError(
            f"{trl_args.section(stage)}.args: {first_line(error)}",
            expected="what TRL and transformers take",
            remedy="correct it, or leave it out",
        ) from error


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers of `report_to` that are unknown, or not installed.

    Raises:
        RecipeError: There is no such tracker.
        SetupError: Its package is missing.
    """
    there = integration_utils.get_available_reporting_integrations()
    for name in names:
        if name in ("all", "none") and len(names) == 1:
            continue
        if name not in integration_utils.INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(integration_utils.INTEGRATION_TO_CALLBACK))
            raise RecipeError(f"report_to: there is no tracker {name!r}", expected=known)
        if name not in (*there, *_NEVER_LISTED):
            raise SetupError(
                f"report_to: the package of {name} is not installed",
                expected=f"one of those that are: {', '.join(there) or 'none'}",
                remedy=f"install {name}, or leave it out of report_to",
            )


_NEVER_LISTED = ("flyte",)
"""Trackers that transformers knows and does not count among those that it could list."""


def effective(args: Any) -> dict[str, Any]:
    """The arguments that decided what a stage computed, defaults included: for record and card."""
    names = _EFFECTIVE if isinstance(args, PPOConfig) else _EFFECTIVE + _OF_GROUPS
    found: dict[str, Any] = {name: getattr(args, name, None) for name in names}
    found.pop("num_train_epochs" if found["max_steps"] > 0 else "max_steps")
    plain = {name: getattr(value, "value", value) for name, value in found.items()}
    return {name: value for name, value in plain.items() if value not in (None, {}, [])}
