# SPDX-License-Identifier: Apache-2.0
"""The reward stage: train one adapter or an ensemble, fit the offset, judge on held-out data.

Source: InstructGPT section 3.5: eq. 1 (in `ranking_trainer`), and the bias that gives
demonstrations mean score 0.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import set_seed

from lora_rlhf._trl import RewardConfig
from lora_rlhf.data.dataset_builder import Prepared
from lora_rlhf.estimates import mean_interval
from lora_rlhf.models import adapters, scoring
from lora_rlhf.models.backbone import MEMBERS, Backbone
from lora_rlhf.models.scoring import Episode
from lora_rlhf.recipe.schema import Recipe
from lora_rlhf.runs.record import Record
from lora_rlhf.training import canaries
from lora_rlhf.training.fit import fit
from lora_rlhf.training.private_training import check_args
from lora_rlhf.training.stage_context import StageContext
from lora_rlhf.training.trl_config import build, effective, trainer_args

from . import ensemble, reward_gate
from .ranking_trainer import RankingTrainer, collate, rankings
from .reward_metrics import Comparisons, ceiling, report

_DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 8, "num_train_epochs": 1, "learning_rate": 2e-4,
    "lr_scheduler_type": "cosine", "warmup_steps": 5, "logging_steps": 5, "disable_dropout": True,
}  # fmt: skip

_SEEDS = ("reward", "held_out", *MEMBERS[1:])
"""Roles, whose positions are added to the recipe's seed."""


def run(
    context: StageContext,
    args: Mapping[str, RewardConfig],
    data: Prepared | None,
    demonstrations: Dataset | None,
    held_out_data: Prepared | None = None,
) -> None:
    """Train the reward role (and a held-out one on other comparisons), fit its offset, judge it.

    With `reward.from` that adapter is taken instead of training one.

    Args:
        data: Comparisons: `prompt`, `chosen`, `rejected`, and `group` if prompts repeat. None: with
            `reward.from`, which is not judged then.
        demonstrations: Rows on which the offset gives mean score 0. None: with `reward.from`, which
            keeps its offset.
        held_out_data: Other comparisons, for a reward model that only evaluates; it is judged on
            the held-out rows of `data`.
    """
    recipe, backbone, record, _ = context
    with record.stage("reward") as entry:
        shown = _episodes(backbone, demonstrations) if demonstrations is not None else []
        if recipe.reward.start:
            entry["from"] = context.take_adapter("reward", recipe.reward.start)
        if data is None:
            if shown:
                fit_offset(backbone, shown, "reward")
            entry |= {
                "offset": backbone.reward_offset.get("reward", 0.0),
                "offset_from": len(shown),
            }
            entry |= {"adapter_sha256": context.save_adapter("reward"), "gate": reward_gate.UNKNOWN}
            return
        held_out = Comparisons.encode(backbone, data.held_out)
        members = ensemble.trained(recipe.reward)
        trained = [_train(context, args[r], data, r) for r in members if "from" not in entry]
        entry |= trained[0] if trained else {}
        if len(members) > 1:
            entry["ensemble"] = _ensemble(recipe, backbone, shown, held_out, trained)
        elif shown:
            fit_offset(backbone, shown, "reward")
        entry |= {"offset": backbone.reward_offset.get("reward", 0.0), "offset_from": len(shown)}
        rewards = ensemble.scores(backbone, held_out.episodes, recipe.reward).rewards
        entry |= report(held_out, rewards)
        if limit := ceiling(data.report.get("labeler_agreement")):
            entry["labeler_agreement"] = limit
        roles = ensemble.roles(recipe.reward)
        hashes = [context.save_adapter(role) for role in roles]
        entry["adapter_sha256"] = hashes[0]
        if "ensemble" in entry:
            entry["ensemble"] |= {"roles": list(roles), "adapter_sha256": hashes}
        if held_out_data is not None:
            _train(context, args["held_out"], held_out_data, "held_out")
            entry |= _judge_held_out(context, shown, held_out, rewards)
        reason = reward_gate.weakness(entry)
        entry["gate"] = "passed" if reason is None else "failed"
        if reason is not None:
            entry["gate_reason"] = reason


def load(backbone: Backbone, record: Record) -> None:
    """Load the reward roles of the finished stage, every member of an ensemble included."""
    entry = record.data["stages"].get("reward", {})
    roles = entry.get("ensemble", {}).get("roles", ["reward"])
    roles = [role for role in roles if "adapter_sha256" in entry]  # not of a stage that was skipped
    roles += ["held_out"] * ("held_out_adapter_sha256" in entry)
    for role, folder in [(role, record.verified(f"adapters/{role}")) for role in roles]:
        adapters.load_role(backbone, role, folder)


def arguments(recipe: Recipe, out: Path) -> dict[str, RewardConfig]:
    """Build TRL's config of each reward model, by role.

    Raises:
        RecipeError: `reward.args` are invalid.
    """
    configs = {}
    held_out = ("held_out",) if recipe.reward.held_out_model else ()
    for role in (*ensemble.trained(recipe.reward), *held_out):
        given = trainer_args(recipe, out, role, _DEFAULTS, recipe.reward.args)
        given["seed"] = recipe.seed + _SEEDS.index(role)
        configs[role] = build("reward", RewardConfig, given)
        check_args("reward", recipe, configs[role])
    return configs


def _train(context: StageContext, args: RewardConfig, data: Prepared, role: str) -> dict[str, Any]:
    """Add the role, starting from SFT, and train it on the rankings."""
    recipe, backbone = context.recipe, context.backbone
    # Averaging weights requires a common start, heads included; the order of rows still differs.
    common = recipe.reward.combine == "warm" and role in MEMBERS
    set_seed(recipe.seed if common else args.seed)
    backbone.add_role(role, copy_from="reference")
    privacy = recipe.reward.privacy
    planted = canaries.draw(privacy.canaries if role != "held_out" else 0, recipe.seed, data.train)
    rows = canaries.plant(data.train, planted)
    # A private example is a whole prompt, however many completions it has.
    train = rankings(backbone, rows, whole=privacy.epsilon is not None)
    build_trainer = functools.partial(
        RankingTrainer,
        backbone,
        role,
        privacy=privacy,
        times=1 if role == "held_out" else len(ensemble.trained(recipe.reward)),
        args=args,
        train_dataset=train,
        data_collator=functools.partial(collate, pad_token_id=backbone.tokenizer.pad_token_id),
    )
    with backbone.training(role):
        trainer, result = fit(context, build_trainer, "reward", name=role)
    entry = {
        "steps": result.global_step,
        "train_loss": result.training_loss,
        "prompts": len(train),
        "args": effective(args),
    }
    if spent := trainer.spent(result.global_step):
        entry["privacy"] = spent
    if planted:
        entry["memorisation"] = canaries.audit_reward(backbone, role, planted, trainer.delta)
    return entry


def _ensemble(
    recipe: Recipe,
    backbone: Backbone,
    shown: list[Episode],
    held_out: Comparisons,
    trained: list[dict[str, Any]],
) -> dict[str, Any]:
    """Measure each member, then merge them (warm) or centre their combined reward."""
    section, members = recipe.reward, ensemble.trained(recipe.reward)
    for role in members:
        fit_offset(backbone, shown, role)
    each = ensemble.member_scores(backbone, held_out.episodes, members)
    prompts = [tuple(prompt) for prompt, _ in held_out.episodes]
    entry: dict[str, Any] = {
        "members": len(members),
        "combine": section.combine,
        "combine_std": section.combine_std,
        "accuracy": [report(held_out, row)["accuracy"] for row in each],
        "accuracy_of_mean": report(held_out, each.mean(axis=0))["accuracy"],
        "disagreement": mean_interval(each.std(axis=0), prompts),
        "steps": [member["steps"] for member in trained],
        "train_loss": [member["train_loss"] for member in trained],
    }
    if section.combine == "warm":
        ensemble.average(backbone, members)
        fit_offset(backbone, shown, "reward")
    else:
        # Shifting all members shifts every combination equally.
        mean = float(np.mean(ensemble.scores(backbone, shown, section).rewards))
        for role in members:
            backbone.reward_offset[role] -= mean
        entry["offsets"] = [backbone.reward_offset[role] for role in members]
    return entry


def _judge_held_out(
    context: StageContext, shown: list[Episode], held_out: Comparisons, rewards: list[float]
) -> dict[str, Any]:
    """Measure the reward model that only evaluates, and its agreement with `rewards`."""
    backbone = context.backbone
    offset = fit_offset(backbone, shown, "held_out")
    [scores] = ensemble.member_scores(backbone, held_out.episodes, ["held_out"])
    same = (held_out.margins(rewards) > 0) == (held_out.margins(scores) > 0)
    return {
        "held_out_accuracy": report(held_out, scores)["accuracy"],
        "held_out_offset": offset,
        "held_out_adapter_sha256": context.save_adapter("held_out"),
        "agreement_with_held_out": held_out.share(same.astype(float)),
    }


def _episodes(backbone: Backbone, demonstrations: Dataset) -> list[Episode]:
    return [
        (backbone.encode_prompt(row["prompt"]), backbone.encode_completion(row["completion"]))
        for row in demonstrations
    ]


def fit_offset(backbone: Backbone, demonstrations: list[Episode], role: str) -> float:
    """Set `backbone.reward_offset[role]` so that demonstrations score 0 on average; returns it.

    A shift does not change the loss, but PPO's value and missing-eos penalty (InstructGPT 3.5).
    """
    backbone.reward_offset[role] = -float(np.mean(scoring.scores(backbone, demonstrations, role)))
    return backbone.reward_offset[role]
