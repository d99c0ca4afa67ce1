# SPDX-License-Identifier: Apache-2.0
"""The training loop that all stages share: build, check, resume, train, check again."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import TypeVar

from transformers.utils import enable_tf32, is_torch_tf32_available

from lora_rlhf.distributed.world import world
from lora_rlhf.errors import NonFiniteError, RecipeError
from lora_rlhf.recipe.trl_args import section

from .checkpoint_callback import CheckpointCallback, Result
from .resumable_trainer import ResumableTrainer
from .stage_context import StageContext
from .stage_log import StageLog
from .trl_config import as_recipe_error

T = TypeVar("T", bound=ResumableTrainer)


def fit(
    context: StageContext,
    build: Callable[..., T],
    stage: str,
    *,
    name: str | None = None,
    unit: int = 1,
    around: contextlib.AbstractContextManager[None] | None = None,
) -> tuple[T, Result]:
    """Build a trainer and train it, from its newest checkpoint if there is one.

    Call it inside `backbone.training(...)`.

    Args:
        build: Called with `callbacks`; returns the trainer.
        name: The training, if the stage has several.
        unit: Optimizer steps per logged step.
        around: Context of the training itself.

    Raises:
        RecipeError: TRL refuses the arguments.
        IdentityError: A start-up identity does not hold.
        NonFiniteError: The loss is not finite.
    """
    name = name or stage
    with as_recipe_error(stage):
        trainer = build(callbacks=[StageLog(context.record, name, context.progress, unit)])
    if world().size > 1 and not trainer.can_be_split():
        raise RecipeError(
            f"{name}: this loss is not a sum over rows: several processes cannot share its batch",
            remedy="use another loss, or one process",
        )
    context.backbone.assert_trainable()
    if trainer.args.tf32 is not None and is_torch_tf32_available():
        enable_tf32(trainer.args.tf32)  # one switch for the process, last set by another stage
    checkpoints = CheckpointCallback(context, stage, name, unit)
    try:
        trainer.before_training()
        with around or contextlib.nullcontext():
            result = checkpoints.train(trainer)
        check_loss(name, result.training_loss)
        trainer.after_training()
    finally:
        context.progress.end()
    return trainer, result


def check_loss(name: str, loss: float) -> None:
    """Stop a training whose loss is not finite.

    Raises:
        NonFiniteError: The loss is NaN or infinite.
    """
    if not math.isfinite(loss):
        raise NonFiniteError(
            f"{name}: the loss is {loss}",
            expected="a finite number",
            remedy=f"lower {section(name)}.args.learning_rate; nothing was saved",
        )
