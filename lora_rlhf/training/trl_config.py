# SPDX-License-Identifier: Apache-2.0
"""TRL configs built from a recipe's `args:`; arguments that TRL rejects are recipe errors."""

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
from lora_rlhf.distributed.world import world
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
"""Fields of TRL's configs that determine a stage's result."""

_OF_GROUPS = ("loss_type", "scale_rewards", "normalize_advantages")
"""Fields that PPO, with its own loss, does not use."""


@dataclasses.dataclass
class PPOConfig(GRPOConfig):
    """GRPO's config, except that one completion per prompt is allowed."""

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
        except ValueError as error:
            # The checks after this one are for vLLM, which PPO does not use.
            if self.num_generations != 1 or "at least 2 generations" not in str(error):
                raise


def trainer_args(
    recipe: Recipe, out: Path, stage: str, defaults: dict[str, Any], given: dict[str, Any]
) -> dict[str, Any]:
    """Merge a stage's defaults and the recipe's `args:` into arguments for a TRL config.

    There is no autocast: the backbone's dtype is set when it is loaded, and adapters are float32.

    Raises:
        RecipeError: `args:` has a key that is set elsewhere, or a number out of range.
    """
    trl_args.refuse(stage, given)
    return {
        "output_dir": str(out / "checkpoints" / stage),
        "seed": recipe.seed,
        "report_to": (world().first and list(recipe.report_to)) or "none",
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
    """Build a TRL config.

    Raises:
        RecipeError: An unknown key or an impossible combination.
    """
    known = frozenset(field.name for field in dataclasses.fields(config) if field.init)
    for key in given:
        if key not in known:
            raise trl_args.unknown(stage, key)
    with as_recipe_error(stage):
        built = config(**given)
        # With several visible GPUs, Trainer would replicate the backbone.
        built._n_gpu = min(built.n_gpu, 1)
        check_rows(stage, built, world().size)
        # Built here for one number, since TRL would fail only inside the stage.
        Trainer.get_optimizer_cls_and_kwargs(built)
        get_scheduler(
            built.lr_scheduler_type,
            torch.optim.SGD([torch.zeros(1)], lr=1.0),
            num_warmup_steps=0,
            num_training_steps=2,
            scheduler_specific_kwargs=built.lr_scheduler_kwargs,
        )
        # Trackers read these, and must not get the user's folders or secrets.
        built.to_dict = functools.partial(_redacted, built)
        built.run_name, built.project = safe(built.run_name), safe(built.project)
        return built


def check_rows(stage: str, built: Any, size: int) -> None:
    """Check that each of `size` processes has equally many rows of a micro-batch.

    Raises:
        RecipeError: The rows do not divide by the processes.
    """
    rows = built.per_device_train_batch_size
    if rows % size:
        window = built.gradient_accumulation_steps
        sizes = [n for n in range(size, rows * window + 1, size) if rows * window % n == 0]
        would = [f"{n} with gradient_accumulation_steps {rows * window // n}" for n in sizes[:3]]
        nearest = [str(n) for n in (rows // size * size, rows // size * size + size) if n]
        raise RecipeError(
            f"{trl_args.section(stage)}.args.per_device_train_batch_size: {rows} rows cannot be "
            f"shared equally by {size} processes",
            expected=f"a multiple of {size}: {', '.join(would or nearest)}",
            remedy="change it, or the number of processes: the batch is that of all processes "
            "together",
        )


def _redacted(args: Any) -> dict[str, Any]:
    # A function of the module, because trackers pickle and copy the arguments.
    values: dict[str, Any] = hide(type(args).to_dict(args))
    return values


@contextlib.contextmanager
def as_recipe_error(stage: str) -> Iterator[None]:
    """Turn a library's error about arguments into a `RecipeError` with its message."""
    try:
        yield
    except (TypeError, ValueError, ImportError, NotImplementedError) as error:
        raise RecipeError(
            f"{trl_args.section(stage)}.args: {first_line(error)}",
            expected="arguments that TRL and transformers accept",
            remedy="correct it, or leave it out",
        ) from error


def check_trackers(names: Sequence[str]) -> None:
    """Reject trackers of `report_to` that are unknown or not installed.

    Raises:
        RecipeError: There is no such tracker.
        SetupError: Its package is missing.
    """
    installed = integration_utils.get_available_reporting_integrations()
    for name in names if list(names) not in (["all"], ["none"]) else ():
        if name not in integration_utils.INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(integration_utils.INTEGRATION_TO_CALLBACK))
            raise RecipeError(f"report_to: there is no tracker {name!r}", expected=known)
        if name not in (*installed, "flyte"):  # which transformers never lists as installed
            raise SetupError(
                f"report_to: the package of {name} is not installed",
                expected=f"an installed tracker: {', '.join(installed) or 'none'}",
                remedy=f"install {name}, or leave it out of report_to",
            )


def effective(args: Any) -> dict[str, Any]:
    """Return the arguments that determined a stage's result, defaults included."""
    names = _EFFECTIVE if isinstance(args, PPOConfig) else _EFFECTIVE + _OF_GROUPS
    values: dict[str, Any] = {name: getattr(args, name, None) for name in names}
    values.pop("num_train_epochs" if values["max_steps"] > 0 else "max_steps")
    plain = {name: getattr(value, "value", value) for name, value in values.items()}
    return {name: value for name, value in plain.items() if value not in (None, {}, [])}
