# SPDX-License-Identifier: Apache-2.0
"""DPO: TRL's trainer on the comparisons that a reward model would be trained on.

Source: 2305.18290, eq. 7. The reference is the frozen SFT adapter. Prompt and completion are
encoded separately, as for SFT and the reward model, so that no token spans both; the loss includes
the completion's eos.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import set_seed

from lora_rlhf._trl import DPOConfig, DPOTrainer
from lora_rlhf.errors import IdentityError
from lora_rlhf.models import scoring
from lora_rlhf.models.backbone import Backbone
from lora_rlhf.recipe.schema import Recipe
from lora_rlhf.training.fit import fit
from lora_rlhf.training.stage_context import StageContext
from lora_rlhf.training.trl_config import build, effective, trainer_args

from . import identities
from .identities import RATIO_TOLERANCE
from .policy_trainer import TiedReferenceTrainer
from .ppo import ppo_stage

_DEFAULTS: dict[str, Any] = {
    # PPO's rate does not carry over: DPO's log-ratios are sums over whole completions.
    "num_train_epochs": 1, "logging_steps": 1, "learning_rate": 5e-5,
}  # fmt: skip

_RENAMED = {
    "rewards/accuracies": "accuracy", "rewards/margins": "margin", "entropy": "policy/entropy",
}  # fmt: skip
"""TRL's name -> ours, where both mean the same; `rewards/chosen` and the like stay TRL's."""

_BY_ROW = {
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard",
    "apo_zero", "apo_down", "discopop", "sigmoid_norm",
}  # fmt: skip
"""Losses of DPO that are a mean over comparisons; `aot` sorts them, `sft` is a mean over tokens."""


def run(context: StageContext, args: DPOConfig, comparisons: Dataset) -> None:
    """Train the policy on rows of `prompt`, `chosen` and `rejected`; saves `adapters/policy`.

    Raises:
        IdentityError: A start-up identity does not hold.
    """
    recipe, backbone, record, _ = context
    with record.stage("dpo") as entry:
        set_seed(recipe.seed)
        backbone.copy_role("reference", "policy")
        rows = tokenize(backbone, comparisons)
        build_trainer = functools.partial(
            ResumableDPOTrainer, backbone, args=args, train_dataset=rows
        )
        with backbone.training("policy"):
            trainer, result = fit(context, build_trainer, "dpo")
        entry |= {
            "reward": "comparisons",
            "beta": args.beta,
            "comparisons": len(rows),
            "epochs": args.num_train_epochs,
            "optimizer_steps": result.global_step,
            "train_loss": result.training_loss,
            "identities": trainer.identities,
            "args": effective(args),
            "adapter_sha256": context.save_adapter("policy"),
        }


def arguments(recipe: Recipe, out: Path) -> DPOConfig:
    """Build TRL's config of this stage; batch size and optimizer default to PPO's.

    Raises:
        RecipeError: A key is set elsewhere, or is unknown to TRL.
    """
    defaults = {**ppo_stage.budget(recipe, out, rollouts=False), **_DEFAULTS}
    merged = trainer_args(recipe, out, "dpo", defaults, recipe.dpo.args)
    config: DPOConfig = build("dpo", DPOConfig, {**merged, "beta": recipe.dpo.beta})
    return config


def tokenize(backbone: Backbone, rows: Dataset) -> Dataset:
    """Encode to `prompt_ids`, and `chosen_ids` and `rejected_ids` with eos."""
    return Dataset.from_list(
        [
            {
                "prompt_ids": backbone.encode_prompt(row["prompt"]),
                "chosen_ids": backbone.encode_completion(row["chosen"]),
                "rejected_ids": backbone.encode_completion(row["rejected"]),
            }
            for row in rows
        ]
    )


class ResumableDPOTrainer(TiedReferenceTrainer, DPOTrainer):
    """TRL's DPO on our backbone, on rows of `tokenize`."""

    _tag_names = ["lora-rlhf", "dpo"]

    def before_training(self) -> None:
        """Check on eight comparisons that the policy starts as SFT."""
        rows = self.train_dataset.select(range(min(8, len(self.train_dataset))))
        episodes = [
            (row["prompt_ids"], row[f"{s}_ids"]) for row in rows for s in ("chosen", "rejected")
        ]
        policy, reference = (
            torch.tensor(
                scoring.sequence_logprobs(self.backbone, episodes, role), dtype=torch.float64
            )
            for role in ("policy", "reference")
        )
        self.identities["kl_at_start"] = identities.policy_equals_reference(
            policy, reference, torch.ones_like(policy)
        )

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        # TRL would encode prompt + completion as one text, and a token could span both.
        return dataset

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        loss = super()._compute_loss(model, inputs, return_outputs)
        if "loss_at_start" not in self.identities and torch.is_tensor(loss):
            self._check_first(float(loss.detach()))
        return loss

    def rows(self, inputs: Any) -> int:
        """Count comparisons: a batch holds all chosen completions, then all rejected ones."""
        return len(inputs["input_ids"]) // 2

    def part(self, inputs: Any, start: int, stop: int) -> Any:
        """Select some comparisons, chosen and rejected completions of each."""
        n = self.rows(inputs)
        both = [*range(start, stop), *range(n + start, n + stop)]
        return {k: v[both] if isinstance(v, Tensor) else v for k, v in inputs.items()}

    def metric_weight(self, name: str, piece: Any) -> float:
        """Count comparisons, or the tokens of the completions that TRL averages over."""
        chosen, rejected = (int(m.sum()) for m in piece["completion_mask"].chunk(2))
        counts = {"entropy": chosen + rejected, "logits/rejected": rejected}
        counts |= dict.fromkeys(("mean_token_accuracy", "logits/chosen"), chosen)
        return counts.get(name, self.rows(piece))

    def can_be_split(self) -> bool:
        """Allow splitting only with losses that are means over comparisons."""
        return super().can_be_split() and set(self.loss_types) <= _BY_ROW

    def share(self, piece: Any, inputs: Any, num_items_in_batch: Any) -> float:
        """Return the share of the comparisons that are in the piece."""
        return self.rows(piece) / self.rows(inputs)

    def _check_first(self, loss: float) -> None:
        """Check that the first loss is -log sigmoid(0) = ln 2: policy and reference are equal."""
        self.identities["loss_at_start"] = loss
        tolerance = RATIO_TOLERANCE[self.backbone.causal.dtype]
        plain = self.loss_types == ["sigmoid"] and not self.args.loss_weights
        if plain and not self.warm_started and not abs(loss - math.log(2)) <= tolerance:
            raise IdentityError(
                f"the first loss of DPO is {loss:.4f}",
                expected=f"ln 2 = {math.log(2):.4f}: policy and reference are both SFT",
                remedy="stage at fault: dpo. Dropout, or another adapter active as reference",
            )

    def renamed(self, metrics: dict[str, list[float]]) -> dict[str, list[float]]:
        """Use PPO's name for a metric that both log."""
        return {_RENAMED.get(name, name): values for name, values in metrics.items()}
