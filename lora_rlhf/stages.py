# SPDX-License-Identifier: Apache-2.0
"""What the training stages share: how a recipe's `args:` become a TRL config."""

from __future__ import annotations

import dataclasses
import difflib
import math
from typing import Any

import torch

from ._trl import GRPOConfig
from .config import Recipe
from .errors import NonFiniteError, RecipeError
from .record import Record

_OWNED = {
    "output_dir": "the run directory", "seed": "seed", "report_to": "report_to",
    "bf16": "model.dtype", "fp16": "model.dtype", "beta": "ppo.kl_coef", "push_to_hub": "hub",
    "gradient_checkpointing": "model.gradient_checkpointing",
    "activation_checkpointing": "model.gradient_checkpointing",
    "gradient_checkpointing_kwargs": "model.gradient_checkpointing",
    "activation_checkpointing_kwargs": "model.gradient_checkpointing",
    "use_cpu": "the device found",
    "max_length": "data.max_tokens", "reward_weights": "ppo.reward",
    "resume_from_checkpoint": "--out", "save_strategy": "--out", "save_steps": "--out",
    "load_best_model_at_end": "ppo.watch", "eval_strategy": "evaluate",
    "trust_remote_code": "nothing: remote code is never run", "hub_token": "the environment",
}  # fmt: skip
"""Keys of TRL's configs that have their home elsewhere in the recipe."""

_UNREAD = {
    **dict.fromkeys(("eos_token", "pad_token", "chat_template_path"),
                    "the tokenizer is shared by every role and settled when the base is loaded"),
    **dict.fromkeys(("dataset_text_field", "dataset_kwargs", "dataset_num_proc",
                     "completion_only_loss", "assistant_only_loss"),
                    "rows come tokenised, and the loss is on completion tokens only"),
    **dict.fromkeys(("auto_find_batch_size", "deepspeed", "fsdp", "fsdp_config",
                     "model_init_kwargs", "use_liger_kernel", "torch_compile"),
                    "it would change the one backbone that all roles share"),
    **dict.fromkeys(("eval_steps", "eval_on_start", "eval_delay", "do_eval", "do_train"),
                    "a stage is evaluated once, when it is over"),
    "disable_dropout": "dropout is off everywhere",
}  # fmt: skip
"""Keys that would do nothing, or harm, and why."""


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
    recipe: Recipe, record: Record, stage: str, defaults: dict[str, Any], given: dict[str, Any]
) -> dict[str, Any]:
    """Keyword arguments for a stage's TRL config: ours, over-ridden by the recipe's `args:`.

    The backbone's dtype is settled at loading and adapters are float32: no autocast is asked for.

    Raises:
        RecipeError: `args:` names a key that has its home elsewhere.
    """
    for key in given:
        if key in _OWNED:
            raise RecipeError(f"{stage}.args.{key} is not set there", remedy=f"use {_OWNED[key]}")
        if key in _UNREAD and stage != "ppo":  # PPO says itself what it reads
            raise RecipeError(
                f"{stage}.args.{key} cannot be set: {_UNREAD[key]}", remedy="leave it out"
            )
    return {
        "output_dir": str(record.folder / "checkpoints" / stage), "seed": recipe.seed,
        "report_to": list(recipe.report_to) or "none", "run_name": f"{recipe.name}-{stage}",
        "bf16": False, "fp16": False, "use_cpu": not torch.cuda.is_available(),
        "activation_checkpointing": recipe.model.gradient_checkpointing,
        "activation_checkpointing_kwargs": {"use_reentrant": False},
        "save_strategy": "no", "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "logging_nan_inf_filter": False, "remove_unused_columns": False, "adam_epsilon": 1e-5,
        "logging_first_step": True, "log_level": "error",
        **({} if stage == "ppo" else {"max_length": recipe.data.max_tokens}),
        **defaults, **given,
    }  # fmt: skip


def build(stage: str, config: Any, arguments: dict[str, Any]) -> Any:
    """A TRL config, with its complaints about `args:` as recipe errors.

    Raises:
        RecipeError: An unknown key or an impossible combination.
    """
    known = {field.name for field in dataclasses.fields(config) if field.init}
    name = next(c.__name__ for c in config.__mro__ if c.__module__.startswith("trl."))
    for key in arguments:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            raise RecipeError(
                f"{stage}.args.{key}: TRL's {name} has no such field",
                remedy=f"did you mean {close[0]!r}?" if close else "leave it out",
            )
    try:
        built = config(**arguments)
        # One process uses one GPU, whatever is visible: transformers would replicate the backbone.
        built._n_gpu = min(built.n_gpu, 1)
        return built
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{stage}.args: {error}", expected=f"what TRL's {name} takes") from error


def check_finite(stage: str, loss: float) -> None:
    """Stop a stage whose loss is not a number.

    Raises:
        NonFiniteError: With what to try.
    """
    if not math.isfinite(loss):
        raise NonFiniteError(
            f"{stage}: the loss is {loss}", expected="a finite number",
            remedy=f"lower {stage}.args.learning_rate; nothing was saved",
        )  # fmt: skip
