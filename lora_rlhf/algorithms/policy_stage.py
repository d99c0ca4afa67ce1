# SPDX-License-Identifier: Apache-2.0
"""What the controls of PPO share: equal budgets, the reference, the identities, the saved policy.

A control is another algorithm in the place of PPO on the same recipe, backbone, reward and report:
GRPO and RLOO in group_trainers.py, DPO in dpo.py, best of n in best_of_n.py.
"""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_rlhf.errors import DataError, IdentityError, RecipeError
from lora_rlhf.models import adapters
from lora_rlhf.models.backbone import ADAPTERS, REWARDS, Backbone
from lora_rlhf.recipe.schema import Recipe
from lora_rlhf.recipe.stage_keys import ALGORITHMS
from lora_rlhf.runs.disk import sha256
from lora_rlhf.runs.record import Record
from lora_rlhf.training.trl_config import PPOConfig

from .ppo import ppo_stage

_CLONE = "ref"
"""Name of the adapter into which TRL clones the policy's, as the reference of its KL."""

_FROM_PPO = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "adam_beta1",
    "adam_beta2", "lr_scheduler_type", "warmup_steps", "max_grad_norm", "weight_decay",
    "disable_dropout",
)  # fmt: skip
"""TRL arguments that every control takes from `ppo.args` where its own `args:` do not say."""

_ROLLOUTS_FROM_PPO = (
    "steps_per_generation", "num_iterations", "epsilon", "temperature", "max_completion_length",
    "top_k", "top_p",
)  # fmt: skip


def from_ppo(recipe: Recipe, record: Record, *, rollouts: bool) -> dict[str, Any]:
    """Arguments that make a control's budget that of PPO by the same recipe.

    Args:
        rollouts: With those of sampling and of PPO's epochs; DPO has neither.

    Raises:
        RecipeError: `ppo.args` are not what PPO could run with.
    """
    config = _ppo_arguments(recipe, record)
    names = _FROM_PPO + (_ROLLOUTS_FROM_PPO if rollouts else ())
    return {name: getattr(config, name) for name in names}


def _ppo_arguments(recipe: Recipe, record: Record) -> PPOConfig:
    # A control has no value that could warm up, so it may have fewer updates than that takes.
    section = recipe.ppo
    if recipe.algorithm != "ppo":
        section = section.model_copy(update={"value_warmup_updates": 0})
    return ppo_stage.arguments(recipe.model_copy(update={"ppo": section}), record)


def sampled_tokens(recipe: Recipe, record: Record) -> int:
    """Most tokens of a completion that the reward model's comparisons are sampled with.

    `ppo.args.max_completion_length`, whatever the algorithm: they are the same for all controls.
    """
    return int(_ppo_arguments(recipe, record).max_completion_length)


def longest(recipe: Recipe, record: Record) -> int:
    """Most tokens of a completion in the rollouts of the recipe's algorithm."""
    section = getattr(recipe, recipe.algorithm)
    own = getattr(section, "args", {}).get("max_completion_length")
    if recipe.algorithm == "ppo" or own is None:
        return sampled_tokens(recipe, record)
    if not isinstance(own, int) or isinstance(own, bool) or own < 1:
        raise RecipeError(
            f"{recipe.algorithm}.args.max_completion_length: {own!r}",
            expected="a whole number from 1",
        )
    return own


def refuse(algorithm: str, given: dict[str, Any], owned: dict[str, str]) -> None:
    """Refuse `args:` that have their home elsewhere in the recipe.

    Args:
        owned: Key of TRL's config -> what to do instead.

    Raises:
        RecipeError: Naming the key and its home.
    """
    for key in given:
        if key in owned:
            raise RecipeError(f"{algorithm}.args.{key} is not set there", remedy=owned[key])


def start_policy(backbone: Backbone) -> None:
    """The policy as a trainable copy of the frozen SFT adapter, as PPO starts."""
    backbone.copy_role("reference", "policy")


def tie_reference(backbone: Backbone) -> int:
    """Make the clone that TRL took of the policy the SFT adapter itself: same tensors, no copy.

    TRL's trainers keep their reference as a second adapter, cloned from the policy's in `__init__`.
    The policy is SFT then, so the clone must be too. Tied to the reference role's tensors, it stays
    so, costs no memory, and is covered by that role's hash. Leaving TRL's own switch to it
    (`set_adapter`) activates and un-freezes whatever PEFT holds for the active adapter of the
    view: that must be the policy's.

    Returns:
        The number of tensors tied; 0 where TRL made no clone (a beta of 0).

    Raises:
        IdentityError: The clone is not the SFT adapter.
    """
    view = backbone.views["policy"]
    parameters = dict(view.named_parameters())
    clones = [name for name in parameters if f".{_CLONE}." in name]
    for name in clones:
        sft = parameters[name.replace(f".{_CLONE}.", f".{ADAPTERS['reference']}.")]
        same = parameters[name].dtype == sft.dtype and torch.equal(parameters[name], sft)
        if not same:
            raise IdentityError(
                f"the reference of the KL penalty is not the SFT adapter: {name} differs",
                expected="a clone of the policy, which starts as SFT",
                remedy="stage at fault: sft. Was another adapter loaded as policy?",
            )
        parameters[name].data = sft.data
    # PEFT's own call would change what is trainable as well.
    view.active_adapter = view.base_model.active_adapter = ADAPTERS["policy"]
    backbone.activate([ADAPTERS["policy"]])
    for name in clones:
        parameters[name].requires_grad_(False)
    backbone.assert_trainable()
    return len(clones)


class Untouched(TrainerCallback):
    """Checks, after the first step that can move anything, that the policy moved and nothing else.

    Make it before training; the trainer calls it after every optimizer step.

    Args:
        backbone: Inside `training("policy")`.
        stage: Who is at fault where it fails.
        trainer: In whose `identities` it notes that it held.
    """

    def __init__(self, backbone: Backbone, stage: str, trainer: Any) -> None:
        self.backbone, self.stage, self.trainer = backbone, stage, trainer
        roles = [None, *(r for r in ("reference", *REWARDS) if backbone.has(r))]
        self.frozen = {role: backbone.state_hash(role) for role in roles}
        self.policy = backbone.state_hash("policy")
        self.done = False

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Called by the Trainer between the optimizer's step and the scheduler's."""
        # A learning rate that warms up from 0 makes a first step that moves nothing.
        moves = optimizer.param_groups[0]["lr"] > 0 and not self.trainer.skipped
        if not self.done and moves:
            self.check()
            self.trainer.identities["only_policy_moved"] = 1
            self.done = True

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: whether it held already."""
        return {"done": self.done}

    def load_state_dict(self, found: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.done = bool(found["done"])

    def check(self) -> None:
        """Compare with what was there at the start.

        Raises:
            IdentityError: Naming the role that moved, or the policy if it did not.
        """
        moved = [
            r or "backbone" for r, h in self.frozen.items() if self.backbone.state_hash(r) != h
        ]
        if self.backbone.state_hash("policy") == self.policy:
            moved.append("policy, which did not,")
        if moved:
            raise IdentityError(
                f"after the first update of {self.stage}, what moved is wrong: {', '.join(moved)}",
                expected="the policy moves; backbone, reference and reward do not",
                remedy=f"stage at fault: {self.stage}. Please report it with record.json",
            )


def save_policy(backbone: Backbone, record: Record) -> dict[str, str]:
    """Save `adapters/policy`; returns what the stage's entry says of it."""
    folder = adapters.save_role(backbone, "policy", record.adapter("policy"))
    return {"adapter_sha256": sha256(folder / "adapter_model.safetensors")}


def enough(algorithm: str, prompts: Dataset, needed: int) -> None:
    """Refuse fewer prompts than one rollout takes.

    Raises:
        DataError: With what to change.
    """
    if len(prompts) < needed:
        raise DataError(
            f"{len(prompts)} prompts",
            expected=f"at least {needed}, one rollout of {ALGORITHMS[algorithm]}",
            remedy=f"give more prompts, or raise {algorithm}.num_generations",
        )
