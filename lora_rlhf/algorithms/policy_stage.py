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

_CLONE = "ref"
"""Name of the adapter into which TRL clones the policy's, as the reference of its KL."""


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


def check(recipe: Recipe, args: Any, prompts: Dataset) -> None:
    """Check the prompts of an algorithm with rollouts before anything is trained.

    Raises:
        DataError: Fewer prompts than one rollout takes, or no checker for a gold reward.
    """
    needed = args.generation_batch_size // args.num_generations
    if len(prompts) < needed:
        name = recipe.algorithm
        key = "lower ppo.args.steps_per_generation"
        if name != "ppo":
            key = f"raise {name}.num_generations"
        raise DataError(
            f"{len(prompts)} prompts",
            expected=f"at least {needed}, one rollout of {ALGORITHMS[name]}",
            remedy=f"give more prompts, or {key}",
        )
    if recipe.ppo.reward == "gold" and not has_checker(prompts):
        raise DataError(
            "ppo.reward is gold, and these prompts have no checker",
            expected="prompts of `task: closed-world`",
            remedy="set ppo.reward to model",
        )


def has_checker(prompts: Dataset) -> bool:
    """Whether every prompt is of a task, whose checker gives the gold reward."""
    return "item" in prompts.column_names and all(prompts["item"])
