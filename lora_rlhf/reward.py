# SPDX-License-Identifier: Apache-2.0
"""The reward model from comparisons, through `trl.RewardTrainer` on a score view of the backbone.

Source: InstructGPT section 3.5, eq. 1 (loss) and the bias that gives demonstrations mean score 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PrinterCallback, set_seed

from . import adapters, guards, heads
from ._trl import RewardConfig, RewardTrainer
from .backbone import Backbone
from .config import Recipe
from .data import Prepared
from .metrics import calibration, wilson
from .progress import Progress, StageLog
from .record import Record, sha256
from .stages import build, check_finite, trainer_args

_DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 8, "num_train_epochs": 1, "learning_rate": 2e-4,
    "lr_scheduler_type": "cosine", "warmup_steps": 5, "logging_steps": 5, "disable_dropout": True,
}  # fmt: skip


def run(
    recipe: Recipe,
    backbone: Backbone,
    record: Record,
    data: Prepared,
    demonstrations: Dataset,
    progress: Progress,
    held_out_data: Prepared | None = None,
) -> None:
    """Train the reward role (and the held-out one on other comparisons), fit its offset, judge it.

    Args:
        data: Comparisons: `prompt`, `chosen`, `rejected`.
        demonstrations: Those on which the offset gives mean score 0.
        held_out_data: Other comparisons, for a reward model that only evaluates.
    """
    with record.stage("reward") as entry:
        record.restart_metrics("reward")
        found, margins = _train(recipe, backbone, record, data, demonstrations, progress, "reward")
        entry |= found
        if held_out_data is not None:
            record.restart_metrics("held_out")
            other, other_margins = _train(
                recipe, backbone, record, held_out_data, demonstrations, progress, "held_out"
            )
            same = (margins > 0) == (other_margins > 0)
            entry |= {"held_out_accuracy": other["accuracy"], "held_out_offset": other["offset"],
                      "held_out_adapter_sha256": other["adapter_sha256"],
                      "agreement_with_held_out": wilson(float(same.sum()), len(same))}  # fmt: skip
        reason = guards.gate_reward(
            entry["accuracy"], entry["score_std"], entry["accuracy_length_baseline"]
        )
        entry["gate"] = "passed" if reason is None else "failed"
        if reason is not None:
            entry["gate_reason"] = reason


def gate(recipe: Recipe, record: Record, progress: Progress) -> None:
    """Let PPO start, or not: it may not optimise against a reward model that failed its gate.

    Raises:
        GateError: The gate failed and the recipe does not say `warn`.
    """
    entry = record.data["stages"]["reward"]
    if entry["gate"] == "passed" or recipe.ppo.reward != "model":
        return
    if recipe.reward.gate == "stop":
        raise guards.refuse(entry["gate_reason"])
    entry["gate"] = "warned"
    record.save()
    progress.say(f"warning: the reward model is weak: {entry['gate_reason']}")


def load(backbone: Backbone, record: Record) -> None:
    """The reward roles from the finished stage."""
    for role in ("reward", "held_out"):
        if record.adapter(role).exists():
            adapters.load_role(backbone, role, record.adapter(role))


def _train(
    recipe: Recipe,
    backbone: Backbone,
    record: Record,
    data: Prepared,
    demonstrations: Dataset,
    progress: Progress,
    role: str,
) -> tuple[dict[str, Any], np.ndarray]:
    # The second model must differ in more than its data, or it would share the first one's luck.
    seed = recipe.seed + (1 if role == "held_out" else 0)
    set_seed(seed)
    backbone.add_role(role, copy_from="reference")
    train = tokenize(backbone, data.train)
    arguments = trainer_args(recipe, record, role, _DEFAULTS, recipe.reward.args)
    args = build("reward", RewardConfig, {**arguments, "seed": seed})
    with backbone.training(role):
        with backbone.float32_kept():
            trainer = RewardTrainer(
                model=backbone.views[role], args=args, train_dataset=train,
                processing_class=backbone.tokenizer, callbacks=[StageLog(record, role, progress)],
            )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        backbone.assert_trainable()
        progress.begin(role, int(len(trainer.get_train_dataloader()) * args.num_train_epochs))
        result = trainer.train()
        check_finite(role, result.training_loss)
    progress.end()
    entry = {"steps": result.global_step, "train_loss": result.training_loss}
    entry |= fit_offset(backbone, demonstrations, role)
    accuracy, margins = held_out_accuracy(backbone, data.held_out, role)
    entry |= accuracy
    folder = adapters.save_role(backbone, role, record.adapter(role))
    entry["adapter_sha256"] = sha256(folder / "adapter_model.safetensors")
    return entry, margins


def tokenize(backbone: Backbone, rows: Dataset) -> Dataset:
    """`chosen_ids` and `rejected_ids`, each prompt + completion + eos, as PPO will score them."""

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        prompt = backbone.encode_prompt(row["prompt"])
        encoded: dict[str, Any] = {
            f"{side}_ids": prompt + backbone.encode_completion(row[side])
            for side in ("chosen", "rejected")
        }
        encoded["length"] = max(len(ids) for ids in encoded.values())
        return encoded | ({"margin": row["margin"]} if row.get("margin") is not None else {})

    return Dataset.from_list([encode(row) for row in rows])


def fit_offset(backbone: Backbone, demonstrations: Dataset, role: str) -> dict[str, Any]:
    """Set `backbone.reward_offset[role]` so that demonstrations score 0 on average.

    The loss is invariant to a shift; PPO's missing-eos penalty and value are not (InstructGPT 3.5).
    """
    episodes = [
        (backbone.encode_prompt(row["prompt"]), backbone.encode_completion(row["completion"]))
        for row in demonstrations
    ]
    mean = float(np.mean(heads.scores(backbone, episodes, role)))
    backbone.reward_offset[role] = -mean
    return {"offset": -mean, "offset_from": len(episodes)}


def held_out_accuracy(
    backbone: Backbone, rows: Dataset, role: str
) -> tuple[dict[str, Any], np.ndarray]:
    """Accuracy on held-out comparisons with its interval, calibration and the length baseline.

    Equal scores count as half right; comparisons of equal length are no evidence for length.

    Returns:
        What the record keeps, and each comparison's margin, chosen minus rejected, shape (n,).
    """
    sides = {}
    lengths = {}
    for side in ("chosen", "rejected"):
        episodes = [
            (backbone.encode_prompt(row["prompt"]), backbone.encode_completion(row[side]))
            for row in rows
        ]
        sides[side] = np.array(heads.scores(backbone, episodes, role))
        lengths[side] = np.array([len(completion) for _, completion in episodes])
    margin = sides["chosen"] - sides["rejected"]
    longer = lengths["chosen"] - lengths["rejected"]
    right = float((margin > 0).sum() + 0.5 * (margin == 0).sum())
    return {
        "accuracy": wilson(right, len(margin)),
        "accuracy_length_baseline": wilson(
            float((longer > 0).sum() + 0.5 * (longer == 0).sum()), len(longer)
        ),
        "score_std": float(np.concatenate(list(sides.values())).std()),
        "mean_margin": float(margin.mean()),
        "calibration": calibration(margin),
    }, margin
